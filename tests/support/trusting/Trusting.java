import java.net.Socket;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyStore;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLSocket;
import javax.net.ssl.TrustManagerFactory;

/** TRUSTSTORE (NAME PORT)...: for each, a line that says whether a client that trusts it accepts NAME. */
class Trusting {
    public static void main(String[] arguments) throws Exception {
        KeyStore store = KeyStore.getInstance("PKCS12");
        try (var file = Files.newInputStream(Path.of(arguments[0]))) {
            store.load(file, "changeit".toCharArray());
        }
        var trust = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
        trust.init(store);
        var context = SSLContext.getInstance("TLS");
        context.init(null, trust.getTrustManagers(), null);
        for (int at = 1; at < arguments.length; at += 2) {
            String name = arguments[at];
            int port = Integer.parseInt(arguments[at + 1]);
            var tcp = new Socket("127.0.0.1", port);
            var tls = (SSLSocket) context.getSocketFactory().createSocket(tcp, name, port, true);
            var parameters = tls.getSSLParameters();
            parameters.setEndpointIdentificationAlgorithm("HTTPS");
            tls.setSSLParameters(parameters);
            try {
                tls.startHandshake();
                System.out.println(name + " " + port + " accepted");
            } catch (Exception refusal) {
                System.out.println(name + " " + port + " refused: " + refusal);
            }
            tls.close();
        }
    }
}
