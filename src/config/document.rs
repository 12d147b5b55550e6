//! The file: text in, a checked configuration out, and back.

use std::{
    fs,
    io::{self, Read},
    path::{self, Path, PathBuf},
};

use serde::{Serialize, Serializer};
use serde_json::{Value as Json, json};
use thiserror::Error;

use super::{
    Config, Protocol,
    form::{Reader, print_section, read_section, section_schema},
    problems::{Position, Problems},
    table::{Key, Section},
    tree::{Kind, Node},
    validate,
};

/// The largest file that is read: a ConfigMap holds no more.
const MAX_SIZE: u64 = 1 << 20;

/// The port of a `postgres` alias that names none.
const POSTGRES_PORT: u16 = 5432;

impl Config {
    /// Reads and checks the file at `path`.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        let unreadable = |source| LoadError::Unreadable { path: path.to_owned(), source };
        let mut text = String::new();
        // The size of a pipe (`--config <(…)`) shows only in reading.
        let read =
            fs::File::open(path).and_then(|file| file.take(MAX_SIZE + 1).read_to_string(&mut text));
        let size = read.map_err(unreadable)?;
        if size as u64 > MAX_SIZE {
            let message = "a configuration has at most 1MiB";
            return Err(unreadable(io::Error::new(io::ErrorKind::FileTooLarge, message)));
        }
        Ok(Self::parse(&text, &path.to_string_lossy())?)
    }

    /// Reads and checks `text`. `file_name` stands in problems, and relative paths begin at its folder.
    pub fn parse(text: &str, file_name: &str) -> Result<Self, Problems> {
        let mut problems = Vec::new();
        let root = Node::parse(text, &mut problems);
        if root.is_none() && !problems.is_empty() {
            return Err(Problems::new(file_name, problems));
        }
        let root = root.unwrap_or_else(|| Node {
            at: Position::START,
            kind: Kind::Scalar { text: String::new(), plain: true },
        });
        let mut reader = Reader::new(folder_of(file_name), problems);
        let mut config = read_section(&document_keys(), &root, &mut reader);
        for (index, alias) in config.aliases.iter_mut().enumerate() {
            let port_was_given = reader.places.was_given(&format!("aliases[{index}].port"));
            if alias.protocol == Protocol::Postgres && !port_was_given {
                alias.port = POSTGRES_PORT;
            }
        }
        let mut problems = reader.problems;
        problems.extend(validate::problems(&config, &reader.places));
        if problems.is_empty() { Ok(config) } else { Err(Problems::new(file_name, problems)) }
    }

    /// Checks what was put together by hand or from the command line; `origin` stands where a file's name would.
    pub fn validate(&self, origin: &str) -> Result<(), Problems> {
        let problems = validate::problems(self, &Default::default());
        if problems.is_empty() { Ok(()) } else { Err(Problems::new(origin, problems)) }
    }

    /// The file that would give this configuration, with every key.
    pub fn to_json(&self) -> Json {
        print_section(&document_keys(), self)
    }

    /// [`Config::to_json`] in YAML.
    pub fn to_yaml(&self) -> String {
        // A tree of JSON has nothing that YAML cannot say; and JSON is YAML.
        serde_saphyr::to_string(&self.to_json()).unwrap_or_else(|_| self.to_json().to_string())
    }

    /// JSON Schema (draft 2020-12) of the file.
    pub fn schema() -> Json {
        let mut schema = section_schema("The configuration of truename.", &document_keys());
        schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
        schema["title"] = json!("truename.yaml");
        schema
    }
}

impl Serialize for Config {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_json().serialize(serializer)
    }
}

/// Why a file gave no configuration.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The file itself could not be read.
    #[error("cannot read the configuration {}: {source}; name another with --config FILE", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its contents are wrong.
    #[error(transparent)]
    Problems(#[from] Problems),
}

/// The keys of the file: those of [`Config`], after the version of the format.
pub(super) fn document_keys() -> Vec<Key<Config>> {
    let version = Key {
        name: "version",
        about: "The version of this format: write `version: 1`.",
        required: true,
        read: |_, node, reader| match &node.kind {
            Kind::Scalar { text, plain: true } if text == "1" => {}
            _ => {
                let found = node.describe();
                let what = format!("{found} is no version of this format; write `version: 1`");
                reader.problem(node.at, &what);
            }
        },
        print: |_| json!(1),
        schema: || json!({ "const": 1 }),
    };
    let mut keys = vec![version];
    keys.extend(Config::keys());
    keys
}

/// Empty where files are named from the working directory anyhow. Absolute else, so that a printed configuration
/// means the same files wherever it is read.
fn folder_of(file_name: &str) -> PathBuf {
    match Path::new(file_name).parent() {
        Some(folder) if !folder.as_os_str().is_empty() => {
            path::absolute(folder).unwrap_or_else(|_| folder.to_owned())
        }
        _ => PathBuf::new(),
    }
}
