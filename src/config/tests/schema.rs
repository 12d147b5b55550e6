use std::collections::BTreeMap;

use serde_json::{Value as Json, json};

use super::*;

/// Every key of a schema by its path, with its own schema.
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
        let in_a_null = ["/active/", "/client_certificate/"].iter().any(|part| path.contains(part));
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
    // A section gets the defaults of its keys; its own default would take away what `full` put there.
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
    // Checks of our own may not be asked for yet; all else must be taken.
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
