//! A configuration file: problems or a configuration, and one that is printed reads the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use truename::config::Config;

fuzz_target!(|text: &str| {
    if let Ok(config) = Config::parse(text, "truename.yaml") {
        let printed = config.to_yaml();
        let again = Config::parse(&printed, "truename.yaml").expect("what is printed can be read");
        assert_eq!(config, again, "{printed}");
    }
});
