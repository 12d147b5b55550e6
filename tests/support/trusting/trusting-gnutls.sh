# ROOTS (NAME PORT)...: for each, a line that says whether a client that trusts ROOTS accepts NAME.
roots=$1
shift
while (($#)); do
    case $1 in
    *[0-9].*[0-9]) name=(--verify-hostname "$1" --disable-sni) ;;
    *) name=(--verify-hostname "$1" --sni-hostname "$1") ;;
    esac
    said=$(gnutls-cli --x509cafile "$roots" --port "$2" "${name[@]}" 127.0.0.1 </dev/null 2>&1) &&
        echo "$1 $2 accepted" || echo "$1 $2 refused: $(grep -m 1 'Status' <<<"$said")"
    shift 2
done
