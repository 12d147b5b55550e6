"""ROOTS (NAME PORT)...: for each, a line that says whether a client that trusts ROOTS accepts NAME."""

import socket
import ssl
import sys

context = ssl.create_default_context(cafile=sys.argv[1])
context.verify_flags |= ssl.VERIFY_X509_STRICT
for name, port in zip(sys.argv[2::2], sys.argv[3::2]):
    with socket.create_connection(("127.0.0.1", int(port))) as tcp:
        try:
            context.wrap_socket(tcp, server_hostname=name).close()
            print(name, port, "accepted")
        except ssl.SSLError as refusal:
            print(name, port, "refused:", refusal)
