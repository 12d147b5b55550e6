//! YAML text as a tree in which every node has its position.
//!
//! Scalars keep their text: the key decides whether `off` is a word or a boolean, and `1.2` a version or a number.

use std::{collections::HashMap, rc::Rc};

use granit_parser::{Event, Parser, ScalarStyle, ScanError, Span, Tag};

use super::problems::{Found, Position, Problem};

/// The largest tree of a file, with anchors counted at each use: thousands of aliases, each with every key, take half
/// of it.
const MAX_SIZE: Size = Size { nodes: 1_000_000, bytes: 16 << 20 };

/// How many of the nodes may come from anchors: enough for a base of forty keys, merged into thousands of aliases.
const MAX_REPEATED: usize = 300_000;

const MAX_DEPTH: usize = 32;

/// The longest text that a problem shows.
const MAX_SHOWN: usize = 100;

/// A value of the file. All uses of an anchor share one node.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) at: Position,
    pub(super) kind: Kind,
    size: Size,
}

/// The size of a node with all nodes in it.
#[derive(Clone, Copy, Debug, Default)]
struct Size {
    nodes: usize,
    /// The length of the texts.
    bytes: usize,
}

impl Size {
    fn add(&mut self, other: Self) {
        self.nodes = self.nodes.saturating_add(other.nodes);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}

#[derive(Debug)]
pub(super) enum Kind {
    Scalar {
        text: String,
        /// Without quotes: only then, `null` is null, and `5` may be a number.
        plain: bool,
    },
    List(Vec<Rc<Node>>),
    /// Each key occurs once.
    Map(Vec<(Key, Rc<Node>)>),
}

#[derive(Clone, Debug)]
pub(super) struct Key {
    pub(super) at: Position,
    pub(super) name: String,
}

impl Node {
    /// Parses the one document of `text`. A syntax error is the last problem, because nothing after it can be parsed.
    pub(super) fn parse(text: &str, problems: &mut Found) -> Option<Rc<Self>> {
        let options = granit_parser::options! {
            emit_comments: false,
            emit_unresolved_aliases: true,
            flow_nesting_limit: MAX_DEPTH,
            block_nesting_limit: MAX_DEPTH,
        };
        let mut builder = Builder {
            parser: Parser::new_from_str_with_options(text, options),
            anchors: HashMap::new(),
            size: Size::default(),
            repeated: 0,
            problems,
        };
        match builder.document() {
            Ok(root) => root,
            Err(stop) => {
                problems.push(stop.into());
                None
            }
        }
    }

    fn new(at: Position, kind: Kind) -> Self {
        let mut size = Size { nodes: 1, bytes: 0 };
        match &kind {
            Kind::Scalar { text, .. } => size.bytes = text.len(),
            Kind::List(items) => items.iter().for_each(|item| size.add(item.size)),
            Kind::Map(pairs) => pairs.iter().for_each(|(key, value)| {
                size.add(Size { nodes: 1, bytes: key.name.len() });
                size.add(value.size);
            }),
        }
        Self { at, kind, size }
    }

    /// An empty document.
    pub(super) fn nothing() -> Rc<Self> {
        Rc::new(Self::new(Position::START, Kind::Scalar { text: String::new(), plain: true }))
    }

    /// The node at a path such as `aliases[0].tls.ca`, or the last node on the way to it, and whether it is the former.
    pub(super) fn find(&self, path: &str) -> (&Self, bool) {
        let mut node = self;
        let steps = path.split(['.', '[']).filter(|step| !step.is_empty());
        for step in steps {
            let next = match &node.kind {
                Kind::List(items) => {
                    let index = step.strip_suffix(']').and_then(|index| index.parse().ok());
                    index.and_then(|index: usize| items.get(index))
                }
                Kind::Map(pairs) => {
                    pairs.iter().find(|(key, _)| key.name == step).map(|(_, value)| value)
                }
                Kind::Scalar { .. } => None,
            };
            match next {
                Some(next) => node = next,
                None => return (node, false),
            }
        }
        (node, true)
    }

    pub(super) fn is_null(&self) -> bool {
        matches!(&self.kind, Kind::Scalar { text, plain: true }
            if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// A description of the node, for an error that expected something else.
    pub(super) fn describe(&self) -> String {
        match &self.kind {
            _ if self.is_null() => "nothing".to_owned(),
            Kind::Scalar { text, .. } if text.len() > MAX_SHOWN => {
                format!("a text of {} bytes", text.len())
            }
            Kind::Scalar { text, plain: true } => format!("`{text}`"),
            Kind::Scalar { text, plain: false } => format!("the text \"{text}\""),
            Kind::List(_) => "a list".to_owned(),
            Kind::Map(_) => "a mapping".to_owned(),
        }
    }
}

/// Why the text cannot be parsed.
enum Stop {
    Syntax(ScanError),
    Limit(Position, String),
}

impl From<ScanError> for Stop {
    fn from(error: ScanError) -> Self {
        Self::Syntax(error)
    }
}

impl From<Stop> for Problem {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Syntax(error) => Self {
                position: Some(Position {
                    line: error.marker().line().max(1),
                    column: error.marker().col() + 1,
                }),
                message: format!("not valid YAML: {}", error.info()),
            },
            Stop::Limit(at, message) => Self { position: Some(at), message },
        }
    }
}

struct Builder<'a> {
    parser: Parser<'a, granit_parser::StrInput<'a>>,
    /// Finished nodes only, so that no node can contain itself.
    anchors: HashMap<usize, Rc<Node>>,
    size: Size,
    /// How many nodes came from anchors.
    repeated: usize,
    problems: &'a mut Found,
}

impl<'a> Builder<'a> {
    fn document(&mut self) -> Result<Option<Rc<Node>>, Stop> {
        let mut root = None;
        while let Some((event, span)) = self.next()? {
            match event {
                Event::StreamStart | Event::DocumentStart(..) | Event::DocumentEnd => {}
                Event::StreamEnd => break,
                _ if root.is_some() => {
                    return Err(Stop::Limit(
                        start(&span),
                        "a second document begins here; a file holds one configuration".to_owned(),
                    ));
                }
                _ => root = Some(self.node(event, &span)?),
            }
        }
        Ok(root)
    }

    fn next(&mut self) -> Result<Option<(Event<'a>, Span)>, Stop> {
        Ok(self.parser.next().transpose()?)
    }

    /// The next event, where the grammar requires one.
    fn within(&mut self, opened: Position) -> Result<(Event<'a>, Span), Stop> {
        self.next()?
            .ok_or_else(|| Stop::Limit(opened, "not valid YAML: this is never closed".to_owned()))
    }

    fn node(&mut self, event: Event<'a>, span: &Span) -> Result<Rc<Node>, Stop> {
        let at = start(span);
        self.spend(Size { nodes: 1, bytes: 0 }, at)?;
        let (kind, anchor) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                let text_tag = tag.as_deref().is_some_and(|tag| tag.is_yaml_core_schema_tag("str"));
                self.refuse_tag(tag.as_deref(), at);
                self.spend(Size { nodes: 0, bytes: text.len() }, at)?;
                let plain = style == ScalarStyle::Plain && !text_tag;
                (Kind::Scalar { text: text.into_owned(), plain }, anchor)
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.refuse_tag(tag.as_deref(), at);
                (self.list(at)?, anchor)
            }
            Event::MappingStart(_, anchor, tag) => {
                self.refuse_tag(tag.as_deref(), at);
                (self.map(at)?, anchor)
            }
            Event::Alias(id) => {
                let Some(node) = self.anchors.get(&id).cloned() else {
                    let message = "this anchor contains itself".to_owned();
                    return Err(Stop::Limit(at, message));
                };
                self.spend(node.size, at)?;
                self.repeated = self.repeated.saturating_add(node.size.nodes);
                if self.repeated > MAX_REPEATED {
                    let message =
                        format!("anchors expand to more than {MAX_REPEATED} values; use fewer");
                    return Err(Stop::Limit(at, message));
                }
                return Ok(node);
            }
            Event::UnresolvedAlias(name) => {
                let name: String = name.chars().take(MAX_SHOWN).collect();
                let message = format!(
                    "`*{name}` refers to an anchor `&{name}` that is not defined before it"
                );
                self.problems.push(Problem { position: Some(at), message });
                (Kind::Scalar { text: String::new(), plain: true }, 0)
            }
            other => {
                let message = format!("not valid YAML: unexpected {other:?}");
                return Err(Stop::Limit(at, message));
            }
        };
        let node = Rc::new(Node::new(at, kind));
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn list(&mut self, opened: Position) -> Result<Kind, Stop> {
        let mut items = Vec::new();
        loop {
            match self.within(opened)? {
                (Event::SequenceEnd, _) => return Ok(Kind::List(items)),
                (event, span) => items.push(self.node(event, &span)?),
            }
        }
    }

    fn map(&mut self, opened: Position) -> Result<Kind, Stop> {
        let mut pairs = Vec::new();
        let mut lines = HashMap::new();
        let mut merged = Vec::new();
        loop {
            let key = match self.within(opened)? {
                (Event::MappingEnd, _) => break,
                (event, span) => self.node(event, &span)?,
            };
            let (event, span) = self.within(opened)?;
            let value = self.node(event, &span)?;
            let (name, plain) = match &key.kind {
                Kind::Scalar { text, plain } => (text.clone(), *plain),
                _ => {
                    let message = format!("{} cannot be a key", key.describe());
                    self.problems.push(Problem { position: Some(key.at), message });
                    continue;
                }
            };
            if name == "<<" && plain {
                merged.push(value);
                continue;
            }
            match lines.get(&name) {
                Some(line) => {
                    let name = key.describe();
                    let message =
                        format!("duplicate key {name}: it is already set on line {line}; keep one");
                    self.problems.push(Problem { position: Some(key.at), message });
                }
                None => {
                    lines.insert(name.clone(), key.at.line);
                    pairs.push((Key { at: key.at, name }, value));
                }
            }
        }
        for source in merged {
            self.merge(&source, &mut pairs, &mut lines);
        }
        Ok(Kind::Map(pairs))
    }

    /// `<<: *base` and `<<: [*one, *other]`: the mapping's own keys take precedence, then the earlier source.
    fn merge(
        &mut self,
        source: &Rc<Node>,
        pairs: &mut Vec<(Key, Rc<Node>)>,
        lines: &mut HashMap<String, usize>,
    ) {
        match &source.kind {
            Kind::Map(more) => {
                for (key, value) in more {
                    if !lines.contains_key(&key.name) {
                        lines.insert(key.name.clone(), key.at.line);
                        pairs.push((key.clone(), value.clone()));
                    }
                }
            }
            Kind::List(sources) => {
                for source in sources {
                    self.merge(source, pairs, lines);
                }
            }
            Kind::Scalar { .. } => {
                let message = format!(
                    "`<<` merges a mapping, such as `<<: *base`, not {}",
                    source.describe()
                );
                self.problems.push(Problem { position: Some(source.at), message });
            }
        }
    }

    fn refuse_tag(&mut self, tag: Option<&Tag>, at: Position) {
        if let Some(tag) = tag.filter(|tag| tag.is_custom()) {
            let message = format!("unknown tag `{tag}`; remove it");
            self.problems.push(Problem { position: Some(at), message });
        }
    }

    fn spend(&mut self, size: Size, at: Position) -> Result<(), Stop> {
        self.size.add(size);
        let Size { nodes, bytes } = MAX_SIZE;
        let message = if self.size.nodes > nodes {
            format!("more than {nodes} values (anchors count at each use)")
        } else if self.size.bytes > bytes {
            format!("more than {bytes} bytes of text (anchors count at each use)")
        } else {
            return Ok(());
        };
        Err(Stop::Limit(at, message))
    }
}

fn start(span: &Span) -> Position {
    Position { line: span.start.line().max(1), column: span.start.col() + 1 }
}
