//! The key by which clients without TLS encrypt their passwords.

use std::sync::{Arc, OnceLock};

use aws_lc_rs::{
    encoding::{AsDer as _, PublicKeyX509Der},
    error::Unspecified,
    rsa::{KeySize, OAEP_SHA1_MGF1SHA1, OaepPrivateDecryptingKey, PrivateDecryptingKey},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use zeroize::Zeroizing;

use super::SCRAMBLE;

/// One key for the process: it is not stored anywhere.
static KEY: OnceLock<Option<Arc<RsaKey>>> = OnceLock::new();

/// An RSA key of 2,048 bits, as servers make theirs.
#[derive(Debug)]
pub struct RsaKey {
    private: OaepPrivateDecryptingKey,
    public: String,
}

impl RsaKey {
    /// The process' own, if it can be made. Blocking: the first call takes a tenth of a second.
    pub fn of_process() -> Option<Arc<Self>> {
        KEY.get_or_init(|| Self::generate().ok().map(Arc::new)).clone()
    }

    /// That key, if it was made already.
    pub fn at_hand() -> Option<Arc<Self>> {
        KEY.get().cloned().flatten()
    }

    /// A new one.
    pub fn generate() -> Result<Self, Unspecified> {
        let private = PrivateDecryptingKey::generate(KeySize::Rsa2048)?;
        let der: PublicKeyX509Der<'_> = private.public_key().as_der()?;
        let base64 = BASE64_STANDARD.encode(der.as_ref());
        let mut public = String::from("-----BEGIN PUBLIC KEY-----\n");
        for line in base64.as_bytes().chunks(64) {
            public.extend(line.iter().map(|byte| char::from(*byte)));
            public.push('\n');
        }
        public.push_str("-----END PUBLIC KEY-----\n");
        Ok(Self { private: OaepPrivateDecryptingKey::new(private)?, public })
    }

    /// The public key, as PEM.
    pub fn public(&self) -> &str {
        &self.public
    }

    /// The password that a client has encrypted, with the zero behind it.
    pub(super) fn decrypt(
        &self,
        encrypted: &[u8],
        scramble: &[u8; SCRAMBLE],
    ) -> Option<Zeroizing<Vec<u8>>> {
        let mut room = Zeroizing::new(vec![0; self.private.min_output_size()]);
        let decrypted = self.private.decrypt(&OAEP_SHA1_MGF1SHA1, encrypted, &mut room, None);
        let decrypted = decrypted.ok()?;
        let unmasked =
            decrypted.iter().zip(scramble.iter().cycle()).map(|(byte, mask)| byte ^ mask);
        let password = Zeroizing::new(unmasked.collect::<Vec<u8>>());
        (password.last() == Some(&0)).then_some(password)
    }
}
