//! Who may use the forward proxy: Basic credentials (RFC 7617), from a file that may change.

use std::path::PathBuf;

use ::http::{HeaderMap, header::PROXY_AUTHORIZATION};
use arc_swap::ArcSwap;
use aws_lc_rs::{
    constant_time::verify_slices_are_equal,
    digest::{SHA256, SHA256_OUTPUT_LEN, digest},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use parking_lot::Mutex;

use crate::{
    config::{CredentialsError, read_credentials},
    files::Settling,
};

/// SHA-256 of `USER:PASSWORD`. Digests have the same length, so that comparing them reveals nothing about
/// the secrets.
type Digest = [u8; SHA256_OUTPUT_LEN];

/// The credentials in use, and their file.
pub struct Credentials {
    file: PathBuf,
    accepted: ArcSwap<Vec<Digest>>,
    /// Digests, or what is wrong with the file.
    looks: Mutex<Settling<Result<Vec<Digest>, String>>>,
}

impl Credentials {
    /// Reads them for the first time.
    pub fn load(file: PathBuf) -> Result<Self, CredentialsError> {
        let digests = read_credentials(&file).map(digests)?;
        let looks = Settling::new(Ok(digests.clone()));
        Ok(Self { file, accepted: ArcSwap::from_pointee(digests), looks: Mutex::new(looks) })
    }

    /// Checks the file, and uses its credentials if they have changed. If they are invalid, the last good
    /// ones stay in use, and that is logged. Blocking, unless another check is running.
    pub fn refresh(&self) {
        let Some(mut looks) = self.looks.try_lock() else { return };
        let now = read_credentials(&self.file).map(digests).map_err(|error| error.to_string());
        if !looks.has_changed(now) {
            return;
        }
        let file = self.file.display();
        match looks.take() {
            Ok(digests) => {
                self.accepted.store(digests.clone().into());
                tracing::info!(%file, "the forward proxy's credentials have changed");
            }
            Err(error) => tracing::warn!(
                %file,
                error,
                "`proxy.credentials` cannot be used; the previous credentials stay in use",
            ),
        }
    }

    /// Whether a request has valid credentials.
    pub fn admit(&self, headers: &HeaderMap) -> bool {
        let mut fields = headers.get_all(PROXY_AUTHORIZATION).iter();
        let (Some(field), None) = (fields.next(), fields.next()) else { return false };
        let Some(given) = basic(field.as_bytes()) else { return false };
        let given = digest(&SHA256, &given);
        let fits = |known: &&Digest| verify_slices_are_equal(*known, given.as_ref()).is_ok();
        // All are compared, so that the time it takes reveals nothing.
        self.accepted.load().iter().filter(fits).count() > 0
    }
}

fn digests(credentials: Vec<String>) -> Vec<Digest> {
    let mut digests = Vec::with_capacity(credentials.len());
    for line in credentials {
        let mut hash = Digest::default();
        hash.copy_from_slice(digest(&SHA256, line.as_bytes()).as_ref());
        digests.push(hash);
    }
    digests
}

/// `USER:PASSWORD` in a field's value.
fn basic(value: &[u8]) -> Option<Vec<u8>> {
    let space = value.iter().position(|byte| *byte == b' ')?;
    let (scheme, token) = value.split_at(space);
    // RFC 9110 §11.1: the scheme is case-insensitive and followed by any number of spaces.
    scheme.eq_ignore_ascii_case(b"basic").then(|| STANDARD.decode(token.trim_ascii()).ok())?
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ::http::HeaderValue;

    use super::*;

    struct File(tempfile::TempDir);

    impl File {
        fn new(contents: &str) -> Self {
            let file = Self(tempfile::tempdir().unwrap());
            file.write(contents);
            file
        }

        fn path(&self) -> PathBuf {
            self.0.path().join("credentials")
        }

        fn write(&self, contents: &str) {
            fs::write(self.path(), contents).unwrap();
        }
    }

    fn field(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(PROXY_AUTHORIZATION, HeaderValue::from_str(value).unwrap())])
    }

    fn with_credentials(credentials: &str) -> HeaderMap {
        field(&format!("Basic {}", STANDARD.encode(credentials)))
    }

    #[test]
    fn only_what_stands_in_the_file_is_admitted() {
        let file = File::new("# all of them\nann:one\nann:two\nbob:a:b\n");
        let credentials = Credentials::load(file.path()).unwrap();
        for good in ["ann:one", "ann:two", "bob:a:b"] {
            assert!(credentials.admit(&with_credentials(good)), "{good}");
        }
        for bad in ["ann:", "ann:on", "ann:one ", "Ann:one", "ann:onex", "bob:a", "", "ann", ":one"]
        {
            assert!(!credentials.admit(&with_credentials(bad)), "{bad}");
        }
        assert!(!credentials.admit(&HeaderMap::new()));
    }

    #[test]
    fn the_field_is_one_and_of_the_basic_scheme_in_any_case() {
        let file = File::new("ann:one\n");
        let credentials = Credentials::load(file.path()).unwrap();
        let token = STANDARD.encode("ann:one");
        for good in [format!("basic {token}"), format!("BASIC   {token}  ")] {
            assert!(credentials.admit(&field(&good)), "{good}");
        }
        for bad in [format!("Bearer {token}"), token.clone(), "Basic".into(), "Basic ".into()] {
            assert!(!credentials.admit(&field(&bad)), "{bad}");
        }
        assert!(!credentials.admit(&field("Basic ann:one")));
        let mut twice = with_credentials("ann:one");
        twice
            .append(PROXY_AUTHORIZATION, HeaderValue::from_str(&format!("Basic {token}")).unwrap());
        assert!(!credentials.admit(&twice), "two fields are two opinions");
    }

    #[test]
    fn a_change_is_taken_at_the_second_look_at_it_and_a_broken_file_not_at_all() {
        let file = File::new("ann:one\n");
        let credentials = Credentials::load(file.path()).unwrap();
        let admitted =
            || ["ann:one", "ann:t", "ann:two"].map(|one| credentials.admit(&with_credentials(one)));

        file.write("ann:t");
        credentials.refresh();
        file.write("ann:two\n");
        credentials.refresh();
        assert_eq!(admitted(), [true, false, false], "what is being written is not taken");
        credentials.refresh();
        assert_eq!(admitted(), [false, false, true]);

        for broken in ["", "nonsense\n", "ann:one\nnonsense\n"] {
            file.write(broken);
            credentials.refresh();
            credentials.refresh();
            assert_eq!(admitted(), [false, false, true], "{broken:?}");
        }
        fs::remove_file(file.path()).unwrap();
        credentials.refresh();
        credentials.refresh();
        assert_eq!(admitted(), [false, false, true]);

        file.write("ann:one\n");
        credentials.refresh();
        credentials.refresh();
        assert_eq!(admitted(), [true, false, false]);
    }
}
