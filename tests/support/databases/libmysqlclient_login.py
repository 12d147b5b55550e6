# The same by libmysqlclient. Its Python module has no argument to have it ask for a public key: so it needs TLS.
import sys

import _mysql_connector

port, user, password, roots = sys.argv[1:]
connection = _mysql_connector.MySQL()
connection.connect(
    host="127.0.0.1",
    port=int(port),
    user=user,
    password=password,
    ssl_disabled=False,
    ssl_ca=roots,
    ssl_verify_identity=True,
)
connection.ping()
print("in")
