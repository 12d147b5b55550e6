// ROOTS (NAME PORT)...: for each, a line that says whether a client that trusts ROOTS accepts NAME.
const fs = require('fs');
const net = require('net');
const tls = require('tls');

const [roots, ...cases] = process.argv.slice(2);
const ca = fs.readFileSync(roots);
for (let at = 0; at < cases.length; at += 2) {
  const [name, port] = [cases[at], Number(cases[at + 1])];
  const options = {
    host: '127.0.0.1',
    port,
    ca,
    servername: net.isIP(name) ? '' : name,
    checkServerIdentity: (_, certificate) => tls.checkServerIdentity(name, certificate),
  };
  const socket = tls.connect(options, () => {
    console.log(`${name} ${port} accepted`);
    socket.destroy();
  });
  socket.on('error', (refusal) => console.log(`${name} ${port} refused: ${refusal.message}`));
}
