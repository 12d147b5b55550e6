// Logs in, and no more.
const mysql = require('mysql2/promise');

const [port, user, password] = process.argv.slice(2);

mysql
  .createConnection({ host: '127.0.0.1', port: Number(port), user, password })
  .then(async (connection) => {
    await connection.ping();
    console.log('in');
    connection.destroy();
  })
  .catch((error) => {
    console.error(error);
    process.exit(1);
  });
