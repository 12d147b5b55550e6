//! The configuration file: from text to a checked configuration, and back.

use std::{
    fs,
    net::SocketAddr,
    path::{self, Path, PathBuf},
};

use serde::{Serialize, Serializer};
use serde_json::{Value as Json, json};
use thiserror::Error;

use super::{
    Alias, Config, DEFAULT_LISTEN, NEVER, Protocol,
    file::{FileError, read_within, refuse_devices, regular},
    form::{print_section, read_section, section_schema},
    places::Places,
    problems::{Found, Problem, Problems},
    reader::Reader,
    table::{Key, Section},
    tree::{Kind, Node},
    validate,
};

/// The largest file that is read: enough for ten thousand aliases with a dozen keys each.
const MAX_SIZE: usize = 4 << 20;

/// The most aliases of one file: each has pools, a DNS name to resolve, and some thirty time series.
const MAX_ALIASES: usize = 10_000;

/// A configuration, and the problems found so far.
pub struct Document {
    name: String,
    /// Values that could not be read have their default.
    config: Option<Config>,
    places: Places,
    problems: Found,
}

impl Document {
    /// Parses and checks `text`. Problems show `file_name`, and relative paths are relative to its folder.
    pub fn parse(text: &str, file_name: &str) -> Self {
        let mut problems = Found::default();
        let root = Node::parse(text, &mut problems);
        let mut document = Self {
            name: file_name.to_owned(),
            config: None,
            places: Places::default(),
            problems: Found::default(),
        };
        if root.is_none() && !problems.is_empty() {
            document.problems = problems;
            return document;
        }
        let root = root.unwrap_or_else(Node::nothing);
        if let (Node { kind: Kind::List(aliases), at, .. }, true) = root.find("aliases")
            && aliases.len() > MAX_ALIASES
        {
            let message = format!("a configuration has at most {MAX_ALIASES} aliases");
            problems.push(Problem { position: Some(*at), message });
            document.problems = problems;
            return document;
        }
        let mut reader = Reader::new(root.clone(), folder_of(file_name), problems);
        let mut config = read_section(&document_keys(), &root, &mut reader);
        document.places = reader.places;
        document.problems = reader.problems;
        for (index, alias) in config.aliases.iter_mut().enumerate() {
            if alias.protocol != Protocol::Http {
                document.complete(&format!("aliases[{index}]"), alias);
            }
        }
        validate::problems(&config, &document.places, &mut document.problems);
        document.config = Some(config);
        document
    }

    /// Gives an alias at `path` the defaults of its protocol, which is not http.
    fn complete(&mut self, path: &str, alias: &mut Alias) {
        let key = |key: &str| format!("{path}.{key}");
        let given = |places: &Places, name| places.was_given(&key(name));
        if !given(&self.places, "port") {
            let of_target = alias.target.as_ref().and_then(|target| target.port);
            match of_target.or(alias.protocol.default_port()) {
                Some(port) => alias.port = port,
                None => {
                    let protocol = alias.protocol.word();
                    let what = format!(
                        "`protocol: {protocol}` requires `port`, the port of the target, such as `port: 8883`"
                    );
                    self.report(&key("protocol"), &what);
                    self.places.mark_unreadable(&key("port"));
                }
            }
        }
        if !given(&self.places, "listen") {
            alias.listen = vec![SocketAddr::new(DEFAULT_LISTEN.ip(), alias.port)];
            // Without a port, it is unknown where it listens.
            if self.places.is_unreadable(&key("port")) {
                self.places.mark_unreadable(&key("listen"));
            }
        }
        if !given(&self.places, "timeouts.idle") {
            alias.timeouts.idle = NEVER;
        }
    }

    /// The configuration as far as it could be read, with defaults for the rest; `None` if the file is not valid YAML.
    pub fn config(&self) -> Option<&Config> {
        self.config.as_ref()
    }

    /// Adds a problem with the value at `path`, such as `aliases[0].tls.crls[1]`, unless that value could not be read.
    pub fn report(&mut self, path: &str, what: &str) {
        if let Some(problem) = self.places.problem(path, what) {
            self.problems.push(problem);
        }
    }

    /// The configuration, if it has no problems.
    pub fn finish(self) -> Result<Config, Problems> {
        match self.config {
            Some(config) if self.problems.is_empty() => Ok(config),
            _ => Err(Problems::new(&self.name, self.problems.into_list())),
        }
    }
}

impl Config {
    /// Reads and checks the file at `path`.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        Ok(Self::parse(&Self::read(path)?, &path.to_string_lossy())?)
    }

    /// Reads the file at `path`, which may be a pipe (`--config <(…)`), for [`Config::parse`].
    pub fn read(path: &Path) -> Result<String, LoadError> {
        read(path, |path| refuse_devices(path).map(drop))
    }

    /// The same, but a pipe is refused: reading it waits for its writer.
    pub fn read_regular(path: &Path) -> Result<String, LoadError> {
        read(path, regular)
    }

    /// Parses and checks `text`. Problems show `file_name`, and relative paths are relative to its folder.
    pub fn parse(text: &str, file_name: &str) -> Result<Self, Problems> {
        Document::parse(text, file_name).finish()
    }

    /// Checks a configuration that was built in code or from the command line. Problems show `origin` instead of a file
    /// name.
    pub fn validate(&self, origin: &str) -> Result<(), Problems> {
        let mut problems = Found::default();
        validate::problems(self, &Places::default(), &mut problems);
        if problems.is_empty() { Ok(()) } else { Err(Problems::new(origin, problems.into_list())) }
    }

    /// A file with this configuration, with every key.
    pub fn to_json(&self) -> Json {
        print_section(&document_keys(), self)
    }

    /// [`Config::to_json`] in YAML.
    pub fn to_yaml(&self) -> String {
        // YAML can represent all JSON; and JSON is YAML.
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

/// Why a file could not be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The file itself could not be read.
    #[error("cannot read the configuration {}: {source}; name another with --config FILE", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: FileError,
    },
    /// Its contents have problems.
    #[error(transparent)]
    Problems(#[from] Problems),
}

fn read(path: &Path, refuse: impl Fn(&Path) -> Result<(), FileError>) -> Result<String, LoadError> {
    let read = || {
        refuse(path)?;
        let bytes = read_within(fs::File::open(path)?, MAX_SIZE)?;
        String::from_utf8(bytes).map_err(|_| FileError::NotText)
    };
    read().map_err(|source| LoadError::Unreadable { path: path.to_owned(), source })
}

/// The keys of the file: the version of the format, and those of [`Config`].
pub(super) fn document_keys() -> Vec<Key<Config>> {
    let version = Key {
        name: "version",
        about: "The version of this format: write `version: 1`.",
        required: true,
        read: |_, node, reader| match &node.kind {
            Kind::Scalar { text, plain: true } if text == "1" => {}
            _ => {
                let found = node.describe();
                let what = format!("{found} is not a version of this format; write `version: 1`");
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

/// The folder of the file; empty if it is the working directory. Absolute otherwise, so that a printed configuration
/// names the same files wherever it is read.
fn folder_of(file_name: &str) -> PathBuf {
    match Path::new(file_name).parent() {
        Some(folder) if !folder.as_os_str().is_empty() => {
            path::absolute(folder).unwrap_or_else(|_| folder.to_owned())
        }
        _ => PathBuf::new(),
    }
}
