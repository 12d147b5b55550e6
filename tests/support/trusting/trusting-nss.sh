# ROOTS (NAME PORT)...: for each, a line that says whether a client that trusts ROOTS accepts NAME.
mkdir nss
certutil -N -d sql:nss --empty-password
csplit -sz -f nss/root- "$1" '/BEGIN CERTIFICATE/' '{*}'
for root in nss/root-*; do
    certutil -A -d sql:nss -n "$root" -t C,, -i "$root"
done
shift
while (($#)); do
    said=$(timeout 10 tstclnt -d sql:nss -h 127.0.0.1 -p "$2" -a "$1" -Q </dev/null 2>&1) &&
        echo "$1 $2 accepted" || echo "$1 $2 refused: $(tail -n 1 <<<"$said")"
    shift 2
done
