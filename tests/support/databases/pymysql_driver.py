# Works with a table as an application does, and prints which TLS the server sees.
import sys

import pymysql

port, user, password, roots = sys.argv[1:]
tls = {"ssl": {"ca": roots, "check_hostname": True}} if roots else {}
connection = pymysql.connect(host="127.0.0.1", port=int(port), user=user, password=password, database="shop", **tls)
with connection.cursor() as cursor:
    cursor.execute("create temporary table things (id int primary key, body longblob)")
    body = bytes(range(256)) * 4096
    cursor.executemany("insert into things values (%s, %s)", [(id, body) for id in range(4)])
    cursor.execute("select id, body from things order by id")
    assert cursor.fetchall() == tuple((id, body) for id in range(4))
    connection.commit()
    cursor.execute("show session status like 'Ssl_version'")
    print(cursor.fetchone()[1])
connection.ping(reconnect=False)
connection.close()
