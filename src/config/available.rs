//! Keys that are known but not available yet.

use serde_json::Value as Json;

use super::{
    Alias, Config,
    form::print_section,
    table::{Key, Section},
};

/// Keys of an alias that can only have their default. Delete a row when it becomes available.
const ALIAS: &[&str] = &["health.active", "limits.queue"];

/// Keys outside the aliases that can only have their default.
const PROCESS: &[&str] = &["kubernetes.watch"];

/// The path of each key with a value that is not available, and the key.
pub(super) fn refused(config: &Config) -> Vec<(String, &'static str)> {
    let mut refused = Vec::new();
    let own = |key: &Key<Config>| key.name != "aliases";
    let keys: Vec<_> = Config::keys().into_iter().filter(own).collect();
    let printed = print_section(&keys, config);
    let defaults = print_section(&keys, &Config::default());
    for &key in PROCESS {
        if value_at(&printed, key) != value_at(&defaults, key) {
            refused.push((key.to_owned(), key));
        }
    }
    let keys = Alias::keys();
    let defaults = print_section(&keys, &Alias::blank());
    for (index, alias) in config.aliases.iter().enumerate() {
        // One at a time: printed, thousands of aliases take ten times their memory.
        let alias = print_section(&keys, alias);
        for &key in ALIAS {
            if value_at(&alias, key) != value_at(&defaults, key) {
                refused.push((format!("aliases[{index}].{key}"), key));
            }
        }
    }
    refused
}

fn value_at<'a>(section: &'a Json, key: &str) -> Option<&'a Json> {
    section.pointer(&format!("/{}", key.replace('.', "/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_names_a_key() {
        let config = Config { aliases: vec![Alias::named("a")], ..Config::default() }.to_json();
        for key in PROCESS {
            assert!(value_at(&config, key).is_some(), "{key}");
        }
        for key in ALIAS {
            assert!(value_at(&config["aliases"][0], key).is_some(), "{key}");
        }
    }
}
