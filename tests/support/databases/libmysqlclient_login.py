# The same by libmysqlclient, which has to be told to ask for a public key. Its own Python module has no argument for that.
import sys

import _mysql_connector

port, user, password, _ = sys.argv[1:]
connection = _mysql_connector.MySQL()
connection.connect(
    host="127.0.0.1", port=int(port), user=user, password=password, ssl_disabled=True, get_server_public_key=True
)
connection.ping()
print("in")
