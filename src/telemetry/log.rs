//! The format of log events: lines of text on a terminal, JSON objects otherwise; always on stderr.

use std::{
    fmt,
    io::{self, IsTerminal},
    sync::OnceLock,
};

use serde::Serializer;
use serde_json::Value;
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    Layer,
    filter::{FilterFn, LevelFilter},
    fmt::{
        FmtContext, FormatEvent, FormatFields, MakeWriter,
        format::Writer,
        time::{FormatTime, SystemTime},
    },
    layer::SubscriberExt,
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt,
};

use super::{access, stderr};
use crate::config::{Log, LogFormat, LogLevel};

type SetLevel = Box<dyn Fn(LogLevel) + Send + Sync>;

static SET_LEVEL: OnceLock<SetLevel> = OnceLock::new();

/// Starts logging with this configuration. In a process that already logs, it only changes the level.
pub fn init(config: &Log) {
    if SET_LEVEL.get().is_some() {
        set_level(config.level);
        return;
    }
    let text = match config.format {
        LogFormat::Text => true,
        LogFormat::Json => false,
        LogFormat::Auto => io::stderr().is_terminal(),
    };
    let (level, handle) = reload::Layer::new(filter(config.level));
    let access = config.access;
    let wanted =
        FilterFn::new(move |metadata: &Metadata<'_>| access || metadata.target() != access::TARGET);
    let layer = if text {
        let colour = is_coloured(io::stderr().is_terminal());
        tracing_subscriber::fmt::layer()
            .with_writer(ToStderr)
            .with_ansi(colour)
            .with_target(false)
            .boxed()
    } else {
        tracing_subscriber::fmt::layer().with_writer(ToStderr).event_format(Json).boxed()
    };
    // A global filter, not one of the layer: a layer's filter remembers the result of the last `enabled!`,
    // and applies it to the next event.
    let subscriber = tracing_subscriber::registry().with(level).with(wanted).with(layer);
    // An embedding program may have its own subscriber. Then its settings apply.
    if subscriber.try_init().is_ok() {
        let set = move |level| {
            let _ = handle.reload(filter(level));
        };
        let _ = SET_LEVEL.set(Box::new(set));
    }
}

/// Whether output may be coloured; `terminal` is whether it goes to a terminal.
pub fn is_coloured(terminal: bool) -> bool {
    // no-color.org: present and not empty.
    terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Changes the level of a running process.
pub fn set_level(level: LogLevel) {
    if let Some(set) = SET_LEVEL.get() {
        set(level);
    }
}

fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    }
}

/// Writes to the log's thread.
struct ToStderr;

impl<'a> MakeWriter<'a> for ToStderr {
    type Writer = stderr::Line;

    fn make_writer(&'a self) -> stderr::Line {
        stderr::Line { access: false }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> stderr::Line {
        stderr::Line { access: metadata.target() == access::TARGET }
    }
}

/// One JSON object per line: `time`, `level`, `message`, then the event's fields, without nesting.
struct Json;

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let mut fields = Fields(Vec::with_capacity(20));
        fields.0.push(("time", time.into()));
        fields.0.push(("level", level(event.metadata().level()).into()));
        event.record(&mut fields);
        let mut line = serde_json::Serializer::new(Vec::with_capacity(256));
        line.collect_map(fields.0).map_err(|_| fmt::Error)?;
        let line = String::from_utf8(line.into_inner()).map_err(|_| fmt::Error)?;
        writeln!(writer, "{line}")
    }
}

fn level(level: &Level) -> &'static str {
    match *level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

/// In the order of the event, because people read these lines too.
struct Fields(Vec<(&'static str, Value)>);

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.0.push((field.name(), value.into()));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.push((field.name(), value.into()));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.push((field.name(), value.into()));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.push((field.name(), value.into()));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.push((field.name(), value.into()));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.push((field.name(), format!("{value:?}").into()));
    }
}
