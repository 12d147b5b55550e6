# The same with Oracle's driver: in Python, and by libmysqlclient.
import sys

import mysql.connector

port, user, password, roots = sys.argv[1:]
tls = {"ssl_ca": roots, "ssl_verify_identity": True} if roots else {"ssl_disabled": True}
for pure in (True, False):
    connection = mysql.connector.connect(
        host="127.0.0.1", port=int(port), user=user, password=password, database="shop", use_pure=pure, **tls
    )
    cursor = connection.cursor(prepared=True)
    cursor.execute("create temporary table things (id int primary key, body varchar(100))")
    for id in range(10):
        cursor.execute("insert into things values (?, ?)", (id, f"thing {id}"))
    connection.commit()
    cursor.execute("select count(*) from things")
    assert cursor.fetchone() == (10,)
    cursor.close()
    cursor = connection.cursor()
    cursor.execute("show session status like 'Ssl_version'")
    version = cursor.fetchone()[1]
    print(version if isinstance(version, str) else version.decode())
    connection.close()
