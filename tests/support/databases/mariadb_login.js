// The same with MariaDB's driver, which has to be told to ask for a public key.
const mariadb = require('mariadb');

const [port, user, password] = process.argv.slice(2);

mariadb
  .createConnection({ host: '127.0.0.1', port: Number(port), user, password, allowPublicKeyRetrieval: true, connectTimeout: 5000 })
  .then(async (connection) => {
    await connection.ping();
    console.log('in');
    connection.destroy();
  })
  .catch((error) => {
    console.error(error);
    process.exit(1);
  });
