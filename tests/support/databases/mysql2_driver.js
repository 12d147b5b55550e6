// The same with mysql2.
const fs = require('fs');
const mysql = require('mysql2/promise');

const [port, user, password, roots] = process.argv.slice(2);

(async () => {
  const ssl = roots ? { ca: fs.readFileSync(roots), verifyIdentity: true } : undefined;
  const connection = await mysql.createConnection({ host: '127.0.0.1', port: Number(port), user, password, database: 'shop', ssl });
  await connection.query('create temporary table things (id int primary key, body varchar(100))');
  for (let id = 0; id < 10; id++) {
    await connection.execute('insert into things values (?, ?)', [id, `thing ${id}`]);
  }
  const [rows] = await connection.query('select count(*) as count from things');
  if (Number(rows[0].count) !== 10) throw new Error(JSON.stringify(rows));
  const [status] = await connection.query("show session status like 'Ssl_version'");
  console.log(status[0].Value);
  await connection.end();
})().catch((error) => {
  console.error(error);
  process.exit(1);
});
