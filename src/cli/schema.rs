//! `truename schema`: the JSON Schema of the configuration, for editors.

use std::io::{self, Write};

use crate::config::Config;

/// Writes the schema.
pub fn run(out: &mut impl Write) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, &Config::schema())?;
    writeln!(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_json_of_the_named_draft() {
        let mut out = Vec::new();
        run(&mut out).unwrap();
        let schema: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
        assert_eq!(schema["properties"]["version"]["const"], 1);
        assert!(out.ends_with(b"}\n"));
    }
}
