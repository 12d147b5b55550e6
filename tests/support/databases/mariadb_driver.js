// The same with MariaDB's driver.
const fs = require('fs');
const mariadb = require('mariadb');

const [port, user, password, roots] = process.argv.slice(2);

(async () => {
  const ssl = roots ? { ca: fs.readFileSync(roots) } : false;
  const connection = await mariadb.createConnection({ host: '127.0.0.1', port: Number(port), user, password, database: 'shop', ssl });
  await connection.query('create temporary table things (id int primary key, body varchar(100))');
  await connection.batch('insert into things values (?, ?)', [...Array(10).keys()].map((id) => [id, `thing ${id}`]));
  const rows = await connection.query('select count(*) as count from things');
  if (Number(rows[0].count) !== 10) throw new Error(String(rows[0].count));
  const status = await connection.query("show session status like 'Ssl_version'");
  console.log(status[0].Value);
  await connection.end();
})().catch((error) => {
  console.error(error);
  process.exit(1);
});
