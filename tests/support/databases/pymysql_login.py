# Logs in, and no more.
import sys

import pymysql

port, user, password, _ = sys.argv[1:]
connection = pymysql.connect(host="127.0.0.1", port=int(port), user=user, password=password, ssl_disabled=True)
connection.ping(reconnect=False)
print("in")
