"""psycopg 3 and asyncpg at an alias: HOST PORT."""

import asyncio
import sys
import threading

import asyncpg
import psycopg

host, port = sys.argv[1], int(sys.argv[2])
login = dict(host=host, port=port, user="app", password="secret")


def with_psycopg():
    with psycopg.connect(dbname="postgres", sslmode="disable", **login) as session:
        row = session.execute("select ssl, version from pg_stat_ssl where pid = pg_backend_pid()").fetchone()
        assert row == (True, "TLSv1.3"), row
        with session.pipeline():
            for number in range(5):
                session.execute("select %s::int", (number,), prepare=True)
        session.execute("create temp table numbers (number int)")
        with session.cursor().copy("copy numbers from stdin") as copy:
            for number in range(50_000):
                copy.write_row((number,))
        with session.cursor().copy("copy numbers to stdout") as copy:
            assert sum(1 for _ in copy.rows()) == 50_000
        session.commit()
        timer = threading.Timer(0.5, session.cancel)
        timer.start()
        try:
            session.execute("select pg_sleep(60)")
        except psycopg.errors.QueryCanceled:
            session.rollback()
        else:
            raise AssertionError("it was not cancelled")
        assert session.execute("select 1").fetchone() == (1,)


async def with_asyncpg():
    listener = await asyncpg.connect(database="postgres", ssl=False, **login)
    heard = asyncio.get_running_loop().create_future()
    await listener.add_listener("news", lambda *message: heard.set_result(message[-1]))
    session = await asyncpg.connect(database="postgres", ssl="prefer", **login)
    await session.execute("select pg_notify('news', 'hello')")
    assert await asyncio.wait_for(heard, 20) == "hello"
    prepared = await session.prepare("select $1::int + 1")
    assert [await prepared.fetchval(number) for number in range(20)] == list(range(1, 21))
    async with session.transaction():
        await session.execute("create temp table texts (text text) on commit drop")
        records = [(str(number),) for number in range(10_000)]
        assert await session.copy_records_to_table("texts", records=records) == "COPY 10000"
    try:
        await asyncio.wait_for(session.execute("select pg_sleep(60)"), 0.5)
    except asyncio.TimeoutError:
        pass
    assert await session.fetchval("select 1") == 1
    await session.close()
    await listener.close()


with_psycopg()
asyncio.run(with_asyncpg())
print("ok")
