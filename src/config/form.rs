//! How values are written in the file: what reads a value also prints it and describes it for editors.

use std::{marker::PhantomData, path::PathBuf, rc::Rc};

use serde_json::{Value as Json, json};

use super::{
    problems::{Found, Places, Position, Problem},
    suggest,
    table::{Choice, Key, Section},
    tree::{Kind, Node},
};

pub(super) use super::scalars::*;

/// No value is longer, but for the path of a file: what parses it shows it in its errors.
const MAX_TEXT: usize = 1024;

/// A way of writing a value.
pub(crate) trait Form {
    /// What is written so.
    type Value: Clone;

    /// The value of `node`, or `None` after telling `reader` what is wrong with it.
    fn read(node: &Node, reader: &mut Reader) -> Option<Self::Value>;

    /// The value as the file would hold it.
    fn print(value: &Self::Value) -> Json;

    /// JSON Schema of what [`Form::read`] accepts.
    fn schema() -> Json;
}

/// A form of one word.
pub(crate) trait Scalar {
    /// What is written so.
    type Value: Clone;

    /// Whether the word may stand in quotes: numbers and booleans may not.
    const QUOTABLE: bool = true;

    /// What is expected, with an example: "a duration such as `5s`".
    fn expected() -> String;

    /// The value, or what is wrong with `text`.
    fn parse(text: &str) -> Result<Self::Value, String>;

    /// The value as the file would hold it.
    fn print(value: &Self::Value) -> Json;

    /// JSON Schema of what [`Scalar::parse`] accepts.
    fn schema() -> Json;
}

impl<S: Scalar> Form for S {
    type Value = S::Value;

    fn read(node: &Node, reader: &mut Reader) -> Option<S::Value> {
        match &node.kind {
            Kind::Scalar { text, .. } if text.len() > MAX_TEXT => {
                reader.mismatch(node, &S::expected())
            }
            Kind::Scalar { text, plain } if !node.is_null() && (*plain || S::QUOTABLE) => {
                S::parse(text).map_err(|why| reader.problem(node.at, &why)).ok()
            }
            _ => reader.mismatch(node, &S::expected()),
        }
    }

    fn print(value: &S::Value) -> Json {
        S::print(value)
    }

    fn schema() -> Json {
        S::schema()
    }
}

/// One of the words of a [`Choice`].
pub(crate) struct OneOf<C>(PhantomData<C>);

impl<C: Choice> Scalar for OneOf<C> {
    type Value = C;

    fn expected() -> String {
        format!("one of {}", suggest::listed(C::ALL.iter().map(|(word, _)| *word)))
    }

    fn parse(text: &str) -> Result<C, String> {
        if let Some((_, choice)) = C::ALL.iter().find(|(word, _)| *word == text) {
            return Ok(*choice);
        }
        let hint = suggest::nearest(text, C::ALL.iter().map(|(word, _)| *word))
            .map_or_else(String::new, |word| format!("; did you mean `{word}`?"));
        Err(format!("`{text}` is not {}{hint}", Self::expected()))
    }

    fn print(choice: &C) -> Json {
        let word = C::ALL.iter().find(|(_, other)| other == choice).map(|(word, _)| *word);
        match word {
            Some("false") => json!(false),
            word => json!(word),
        }
    }

    /// Words that YAML takes for numbers or booleans may stand with quotes and without, so both are listed.
    fn schema() -> Json {
        let words = C::ALL.iter().flat_map(|(word, _)| {
            let bare = serde_json::from_str::<Json>(word).ok();
            [Some(json!(word)), bare]
        });
        json!({ "enum": words.flatten().collect::<Vec<Json>>() })
    }
}

/// `null`, or another form.
pub(crate) struct Nullable<F>(PhantomData<F>);

impl<F: Form> Form for Nullable<F> {
    type Value = Option<F::Value>;

    fn read(node: &Node, reader: &mut Reader) -> Option<Self::Value> {
        if node.is_null() { Some(None) } else { F::read(node, reader).map(Some) }
    }

    fn print(value: &Self::Value) -> Json {
        value.as_ref().map_or(Json::Null, F::print)
    }

    fn schema() -> Json {
        json!({ "anyOf": [F::schema(), { "type": "null" }] })
    }
}

/// A list of values in another form.
pub(crate) struct List<F>(PhantomData<F>);

impl<F: Form> Form for List<F> {
    type Value = Vec<F::Value>;

    fn read(node: &Node, reader: &mut Reader) -> Option<Self::Value> {
        let Kind::List(items) = &node.kind else {
            return reader.mismatch(node, "a list, such as `[a, b]` or one `- item` per line");
        };
        let read =
            |(index, item): (usize, &Rc<Node>)| reader.inside(&format!("[{index}]"), item, F::read);
        let values: Vec<_> = items.iter().enumerate().filter_map(read).collect();
        // Without the bad ones the indices are no longer those of the file.
        if values.len() < items.len() {
            reader.places.mark_unreadable(&reader.path);
        }
        Some(values)
    }

    fn print(value: &Self::Value) -> Json {
        value.iter().map(F::print).collect()
    }

    fn schema() -> Json {
        json!({ "type": "array", "items": F::schema() })
    }
}

/// A mapping of the keys of a [`Section`].
pub(crate) struct Sub<S>(PhantomData<S>);

impl<S: Section + Clone> Form for Sub<S> {
    type Value = S;

    fn read(node: &Node, reader: &mut Reader) -> Option<S> {
        Some(read_section(&S::keys(), node, reader))
    }

    fn print(section: &S) -> Json {
        print_section(&S::keys(), section)
    }

    fn schema() -> Json {
        section_schema(S::ABOUT, &S::keys())
    }
}

/// Reads the mapping `node`; a key whose value is bad keeps its default, and all do where it is no mapping.
pub(super) fn read_section<S: Section>(keys: &[Key<S>], node: &Node, reader: &mut Reader) -> S {
    let mut section = S::blank();
    let pairs = match &node.kind {
        Kind::Map(pairs) => pairs.as_slice(),
        // A heading whose keys are all commented out.
        _ if node.is_null() => &[],
        _ => {
            let names = suggest::listed(keys.iter().map(|key| key.name));
            let expected = format!("a mapping of {names}");
            return reader.mismatch(node, &expected).unwrap_or(section);
        }
    };
    for (given, value) in pairs {
        match keys.iter().find(|key| key.name == given.name) {
            Some(key) => {
                let read =
                    |node: &Node, reader: &mut Reader| (key.read)(&mut section, node, reader);
                reader.inside(&format!(".{}", key.name), value, read);
            }
            None => reader.unknown_key(given.at, &given.name, keys.iter().map(|key| key.name)),
        }
    }
    for key in keys.iter().filter(|key| key.required) {
        if !pairs.iter().any(|(given, _)| given.name == key.name) {
            reader.missing(node.at, key.name, key.about.trim());
        }
    }
    section
}

/// All keys of a section in their order.
pub(super) fn print_section<S>(keys: &[Key<S>], section: &S) -> Json {
    keys.iter().map(|key| (key.name.to_owned(), (key.print)(section))).collect()
}

/// The schema of a section: its keys with descriptions and defaults.
pub(super) fn section_schema<S: Section>(about: &str, keys: &[Key<S>]) -> Json {
    let blank = S::blank();
    let property = |key: &Key<S>| {
        let mut schema = (key.schema)();
        schema["description"] = json!(key.about.trim());
        if !key.required {
            schema["default"] = (key.print)(&blank);
        }
        (key.name.to_owned(), schema)
    };
    let required: Vec<_> = keys.iter().filter(|key| key.required).map(|key| key.name).collect();
    let mut schema = json!({
        // An empty heading is a section of defaults, unless something is required in it.
        "type": if required.is_empty() { json!(["object", "null"]) } else { json!("object") },
        "description": about.trim(),
        "properties": keys.iter().map(property).collect::<Json>(),
        "additionalProperties": false,
    });
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}

/// Walks a tree: knows where it is, and collects what is wrong.
pub(crate) struct Reader {
    path: String,
    /// Relative files lie beside the configuration; empty: the working directory.
    pub(super) folder: PathBuf,
    pub(super) places: Places,
    pub(super) problems: Found,
}

impl Reader {
    pub(super) fn new(root: Rc<Node>, folder: PathBuf, problems: Found) -> Self {
        Self { path: String::new(), folder, places: Places::of(root), problems }
    }

    /// Says what is wrong with the value being read.
    pub(super) fn problem(&mut self, at: Position, what: &str) {
        self.places.mark_unreadable(&self.path);
        let message = match self.path.as_str() {
            "" => what.to_owned(),
            path => format!("{path}: {what}"),
        };
        self.problems.push(Problem { position: Some(at), message });
    }

    fn mismatch<T>(&mut self, node: &Node, expected: &str) -> Option<T> {
        let found = node.describe();
        self.problem(node.at, &format!("expected {expected}, found {found}"));
        None
    }

    fn unknown_key<'a>(
        &mut self,
        at: Position,
        name: &str,
        known: impl Iterator<Item = &'a str> + Clone,
    ) {
        let hint = match suggest::nearest(name, known.clone()) {
            // The second is what such tools make of the first, as Helm when it prints a file.
            _ if matches!(name, "on" | "true") && known.clone().any(|key| key == "when") => {
                "use `when`: YAML 1.1 tools read `on` as the boolean true"
                    .to_owned()
            }
            _ if name == "leaf_lifetime" => {
                "it was removed: certificates are created once and replaced before they expire; leave it out"
                    .to_owned()
            }
            Some(key) => format!("did you mean `{key}`?"),
            None => format!("expected one of {}", suggest::listed(known)),
        };
        let name: String = name.chars().take(MAX_TEXT).collect();
        let message = format!("unknown key `{name}`; {hint}");
        self.problems.push(Problem { position: Some(at), message });
    }

    fn missing(&mut self, at: Position, key: &str, about: &str) {
        let place = match self.path.as_str() {
            "" => String::new(),
            path => format!("{path}: "),
        };
        self.places.mark_unreadable(&format!("{}.{key}", self.path));
        let message = format!("{place}the key `{key}` is missing: {about}");
        self.problems.push(Problem { position: Some(at), message });
    }

    /// Reads `node` one step (`.key` or `[index]`) further down.
    fn inside<T>(
        &mut self,
        step: &str,
        node: &Node,
        read: impl FnOnce(&Node, &mut Self) -> T,
    ) -> T {
        let above = self.path.len();
        // The root's own keys have no dot before them.
        self.path.push_str(if above == 0 { step.trim_start_matches('.') } else { step });
        let value = read(node, self);
        self.path.truncate(above);
        value
    }
}
