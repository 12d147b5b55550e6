//! How values are written in the file. A form reads a value, prints it, and describes it for editors.

use std::{marker::PhantomData, rc::Rc};

use serde_json::{Value as Json, json};

use super::{
    reader::{MAX_TEXT, Reader},
    suggest,
    table::{Choice, Key, Section},
    tree::{Kind, Node},
};

/// A way of writing a value.
pub(crate) trait Form {
    /// The type of the value.
    type Value: Clone;

    /// The value of `node`, or `None` after reporting a problem to `reader`.
    fn read(node: &Node, reader: &mut Reader) -> Option<Self::Value>;

    /// The value as it would be in the file.
    fn print(value: &Self::Value) -> Json;

    /// JSON Schema of what [`Form::read`] accepts.
    fn schema() -> Json;
}

/// A value that is written as one word.
pub(crate) trait Scalar {
    /// The type of the value.
    type Value: Clone;

    /// Whether the word may be quoted: numbers and booleans may not.
    const QUOTABLE: bool = true;

    /// What is expected, with an example: "a duration such as `5s`".
    fn expected() -> String;

    /// The value, or what is wrong with `text`.
    fn parse(text: &str) -> Result<Self::Value, String>;

    /// The value as it would be in the file.
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
            Some("true") => json!(true),
            word => json!(word),
        }
    }

    /// Words that YAML takes for numbers or booleans may be written with or without quotes, so both are listed.
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
        // Without the invalid ones, the indices are no longer those of the file.
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

/// Reads the mapping `node`. A key with an invalid value keeps its default. If it is not a mapping, all keys do.
pub(super) fn read_section<S: Section>(keys: &[Key<S>], node: &Node, reader: &mut Reader) -> S {
    let mut section = S::blank();
    let pairs = match &node.kind {
        Kind::Map(pairs) => pairs.as_slice(),
        // All keys of the section are commented out.
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
        // An empty section has all defaults, unless something is required in it.
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
