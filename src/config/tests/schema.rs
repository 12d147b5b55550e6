use std::collections::BTreeMap;

use serde_json::{Value as Json, json};

use super::*;

/// Every key of a schema by its path, with its schema.
fn keys<'a>(schema: &'a Json, path: &str, found: &mut BTreeMap<String, &'a Json>) {
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}/{name}");
        keys(property, &path, found);
        keys(&property["items"], &format!("{path}/0"), found);
        keys(&property["anyOf"][0], &path, found);
        found.insert(path, property);
    }
}

/// A configuration in which no list of sections is empty and no section null.
fn full() -> Json {
    let mut config = json!({ "version": 1, "aliases": [{ "name": "a" }] });
    config["aliases"][0]["health"]["active"] = json!({});
    config["aliases"][0]["via"] = json!({ "url": "http://proxy:3128" });
    let pair = json!({ "cert": "Cargo.toml", "key": "Cargo.toml" });
    config["aliases"][0]["tls"]["client_certificate"] = pair;
    config
}

#[test]
fn the_schema_knows_the_keys_of_the_documentation_and_no_others() {
    let schema = Config::schema();
    let mut found = BTreeMap::new();
    keys(&schema, "", &mut found);
    let documented: Json = serde_saphyr::from_str(DEFAULTS).unwrap();
    for path in found.keys() {
        let in_a_null =
            ["/active/", "/client_certificate/", "/via/"].iter().any(|part| path.contains(part));
        assert!(in_a_null || documented.pointer(path).is_some(), "{path} is not documented");
    }
    fn leaves(value: &Json, path: &str, paths: &mut Vec<String>) {
        for (name, value) in value.as_object().into_iter().flatten() {
            let path = format!("{path}/{name}");
            leaves(value, &path, paths);
            leaves(&value[0], &format!("{path}/0"), paths);
            paths.push(path);
        }
    }
    let mut paths = Vec::new();
    leaves(&documented, "", &mut paths);
    for path in paths {
        assert!(found.contains_key(&path), "{path} is not in the schema");
    }
}

#[test]
fn every_key_of_the_schema_is_accepted_with_its_default() {
    let schema = Config::schema();
    let mut found = BTreeMap::new();
    keys(&schema, "", &mut found);
    assert!(found.len() > 70, "only {} keys", found.len());
    let mut config = full();
    // A section gets the defaults of its keys; its own default would remove what `full` added.
    for (path, schema) in &found {
        let is_section = found.keys().any(|other| other.starts_with(&format!("{path}/")));
        if let (Some(default), false) = (schema.get("default"), is_section) {
            let mut place = &mut config;
            for step in path.split('/').skip(1) {
                place = match step.parse::<usize>() {
                    Ok(index) => &mut place[index],
                    Err(_) => &mut place[step],
                };
            }
            *place = default.clone();
        }
    }
    let text = config.to_string();
    // Values may be not available yet; all others must be accepted.
    let complaints: Vec<_> = match Config::parse(&text, "truename.yaml") {
        Ok(_) => Vec::new(),
        Err(problems) => problems.list.into_iter().map(|problem| problem.message).collect(),
    };
    let refused = |message: &String| !message.contains("is not available in this version");
    assert_eq!(complaints.into_iter().find(refused), None);
}

#[test]
fn the_defaults_of_the_schema_are_those_of_the_types() {
    let schema = Config::schema();
    let mut found = BTreeMap::new();
    keys(&schema, "", &mut found);
    let mut alias = Alias::named("a");
    alias.health.active = Some(ActiveHealth::default());
    let printed = Config { aliases: vec![alias], ..Config::default() }.to_json();
    let mut compared = 0;
    for (path, schema) in &found {
        if let Some(default) = schema.get("default") {
            let of_alias = path.starts_with("/aliases/");
            let expected = if path == "/aliases" {
                json!([])
            } else if of_alias && path.ends_with("/health/active") {
                Json::Null
            } else if of_alias && path.ends_with("/health") {
                let mut health = printed.pointer(path).unwrap().clone();
                health["active"] = Json::Null;
                health
            } else {
                printed.pointer(path).unwrap_or_else(|| panic!("{path}")).clone()
            };
            assert_eq!(*default, expected, "{path}");
            compared += 1;
        }
    }
    assert!(compared > 70, "only {compared} keys");
}

#[test]
fn every_key_is_described() {
    let schema = Config::schema();
    let mut found = BTreeMap::new();
    keys(&schema, "", &mut found);
    for (path, schema) in found {
        let description = schema["description"].as_str().unwrap_or_default();
        assert!(description.ends_with('.'), "{path}: {description:?}");
    }
    assert_eq!(schema["required"], json!(["version"]));
    assert_eq!(schema["properties"]["aliases"]["items"]["required"], json!(["name"]));
    assert_eq!(schema["additionalProperties"], json!(false));
}

/// Whether a schema accepts a scalar. Supports what our schemas use.
fn takes(schema: &Json, value: &Json) -> bool {
    let kind = |name: &str| match name {
        "string" => value.is_string(),
        "integer" => value.is_u64(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        other => panic!("the type {other}"),
    };
    let any = schema["anyOf"].as_array();
    let words = schema["enum"].as_array();
    let bound = |key: &str| schema[key].as_u64().zip(value.as_u64());
    any.is_none_or(|any| any.iter().any(|schema| takes(schema, value)))
        && words.is_none_or(|words| words.contains(value))
        && schema.get("const").is_none_or(|only| only == value)
        && match &schema["type"] {
            Json::String(name) => kind(name),
            Json::Array(names) => names.iter().any(|name| kind(name.as_str().unwrap())),
            _ => true,
        }
        && bound("minimum").is_none_or(|(least, value)| least <= value)
        && bound("maximum").is_none_or(|(most, value)| value <= most)
        && value.as_str().is_none_or(|text| !text.is_empty() || schema.get("minLength").is_none())
}

/// Patterns are not compared, and the schema does not describe every text that the reader refuses.
#[test]
fn the_schema_takes_what_the_reader_takes() {
    let schema = Config::schema();
    let mut found = BTreeMap::new();
    keys(&schema, "", &mut found);
    let words = found.values().flat_map(|schema| {
        let of = |schema: &Json| schema["enum"].as_array().cloned().unwrap_or_default();
        let any = schema["anyOf"].as_array().cloned().unwrap_or_default();
        [of(schema), any.iter().flat_map(of).collect(), of(&schema["items"])].concat()
    });
    let mut values: Vec<Json> = words.collect();
    let more = [
        "null",
        "\"\"",
        "\"null\"",
        "0",
        "1",
        "443",
        "70000",
        "\"443\"",
        "1.2",
        "\"1.2\"",
        "2",
        "\"2\"",
        "1.1",
        "true",
        "false",
        "\"true\"",
        "\"false\"",
        "\"off\"",
        "\"5s\"",
        "\"20%\"",
        "\"a\"",
        "\"127.0.0.1:80\"",
        "\"64KiB\"",
        "-1",
        "[]",
        "{}",
    ];
    values.extend(more.map(|text| serde_json::from_str::<Json>(text).unwrap()));
    let mut compared = 0;
    let mut differing = Vec::new();
    for (path, schema) in &found {
        let is_section = found.keys().any(|other| other.starts_with(&format!("{path}/")));
        let is_file = schema["description"].as_str().unwrap().contains("ile");
        if is_section || is_file || path == "/version" {
            continue;
        }
        for value in &values {
            let mut config = full();
            let place = path.split('/').skip(1).fold(&mut config, |place, step| {
                match step.parse::<usize>() {
                    Ok(index) => &mut place[index],
                    Err(_) => &mut place[step],
                }
            });
            *place = value.clone();
            let text = config.to_string();
            let mut document = Document::parse(&text, "t.yaml");
            // A schema does not describe how several keys go together.
            let key = path[1..].replace("/0", "[0]").replace('/', ".");
            document.report(&key, "read");
            let problems = document.finish().unwrap_err();
            let read =
                problems.list.iter().any(|problem| problem.message == format!("{key}: read"));
            let described = takes(schema, value);
            let only_a_pattern_differs = described && !read && value.is_string();
            // For YAML, `123` is a number; the reader accepts it as a name.
            let is_text = read && takes(schema, &json!(value.to_string()));
            if read != described && !only_a_pattern_differs && !is_text {
                differing
                    .push(format!("{path}: {value}: the reader {read}, the schema {described}"));
            }
            compared += 1;
        }
    }
    assert_eq!(differing, Vec::<String>::new());
    assert!(compared > 1_000, "only {compared} values");
}
