# ROOTS (NAME PORT)...: for each, a line that says whether a client that trusts ROOTS accepts NAME.
roots=$1
shift
while (($#)); do
    case $1 in
    *[0-9].*[0-9]) verify=(-verify_ip "$1" -noservername) ;;
    *) verify=(-verify_hostname "$1" -servername "$1") ;;
    esac
    said=$(openssl s_client -connect "127.0.0.1:$2" -CAfile "$roots" -no-CApath -no-CAstore -x509_strict \
        -verify_return_error "${verify[@]}" </dev/null 2>&1) &&
        grep -q 'Verification: OK' <<<"$said" && echo "$1 $2 accepted" ||
        echo "$1 $2 refused: $(grep -m 1 -i 'verif' <<<"$said")"
    shift 2
done
