//! An alias on the command line.

use std::net::SocketAddr;

use thiserror::Error;

use super::{
    Alias, DEFAULT_LISTEN, NEVER, Protocol,
    names::{BadName, BadTarget, Target, normal_name},
    suggest::{listed, nearest},
    table::Choice as _,
};

/// `[PROTOCOL://]ALIAS[=TARGET[:PORT]]`, or `PROTOCOL://ALIAS:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    /// As it was typed.
    text: String,
    /// The alias, in normal form.
    pub name: String,
    protocol: Option<Protocol>,
    target: Option<Target>,
    /// The target's port, where no target is named.
    port: Option<u16>,
}

impl Argument {
    /// Parses an argument; an IPv6 target is in brackets.
    pub fn parse(text: &str) -> Result<Self, ArgumentError> {
        let argument = || text.to_owned();
        let (alias, target) = match text.split_once('=') {
            Some((alias, target)) => (alias, Some(target)),
            None => (text, None),
        };
        let (protocol, name) = match alias.split_once("://") {
            Some((word, name)) => (Some(protocol(text, word, name)?), name),
            None => (None, alias),
        };
        if name.is_empty() {
            return Err(ArgumentError::NoName { argument: argument() });
        }
        let (name, port) = match name.rsplit_once(':') {
            // `postgres:/db` has no port: it is not a name either.
            Some((name, port)) if target.is_none() && !port.starts_with('/') => {
                if matches!(protocol, Some(Protocol::Http) | None) {
                    let (name, port) = (name.to_owned(), port.to_owned());
                    let argument = argument();
                    return Err(ArgumentError::PortWithoutTarget { argument, name, port });
                }
                let number = port.parse().ok().filter(|&number: &u16| number != 0);
                let Some(number) = number else {
                    let (argument, port) = (argument(), port.to_owned());
                    return Err(ArgumentError::Port { argument, port });
                };
                (name, Some(number))
            }
            _ => (name, None),
        };
        let name = normal_name(name)
            .map_err(|source| ArgumentError::Name { argument: argument(), source })?;
        let target = match target {
            Some("") => return Err(ArgumentError::NoTarget { argument: argument(), name }),
            Some(target) => {
                let target = target.parse();
                let argument = argument();
                Some(target.map_err(|source| ArgumentError::Target { argument, source })?)
            }
            None => None,
        };
        Ok(Self { text: argument(), name, protocol, target, port })
    }

    /// The alias, with the defaults of its protocol for what is not named.
    pub fn into_alias(self) -> Result<Alias, ArgumentError> {
        let mut alias = Alias::named(self.name);
        alias.protocol = self.protocol.unwrap_or(Protocol::Http);
        let of_target = self.target.as_ref().and_then(|target| target.port);
        alias.target = self.target;
        if alias.protocol == Protocol::Http {
            return Ok(alias);
        }
        let port = of_target.or(self.port).or(alias.protocol.default_port());
        let Some(port) = port else {
            let (argument, protocol) = (self.text, alias.protocol.word());
            return Err(ArgumentError::NoPort { argument, protocol, name: alias.name });
        };
        alias.port = port;
        alias.listen = vec![SocketAddr::new(DEFAULT_LISTEN.ip(), port)];
        alias.timeouts.idle = NEVER;
        Ok(alias)
    }

    /// Gives an alias of a file the target of the argument. A file that says otherwise about the rest is
    /// probably not the one that was meant.
    pub fn amend(self, alias: &mut Alias) -> Result<(), ArgumentError> {
        let differs = |key: &'static str, value: String| ArgumentError::Differs {
            argument: self.text.clone(),
            name: self.name.clone(),
            key,
            value,
        };
        if self.protocol.is_some_and(|protocol| protocol != alias.protocol) {
            return Err(differs("protocol", alias.protocol.word().to_owned()));
        }
        if self.port.is_some_and(|port| port != alias.port) {
            return Err(differs("port", alias.port.to_string()));
        }
        if self.target.is_some() {
            alias.target = self.target;
        }
        Ok(())
    }
}

impl Alias {
    /// Parses `[PROTOCOL://]ALIAS[=TARGET[:PORT]]`, such as `webscaler-manual`, `webscaler-manual=httpbin.org` or
    /// `tcp://broker=mqtt.example.com:8883`, or `PROTOCOL://ALIAS:PORT` for an alias of another protocol than http
    /// that DNS leads to its target. An IPv6 target is in brackets.
    pub fn from_arg(argument: &str) -> Result<Self, ArgumentError> {
        Argument::parse(argument)?.into_alias()
    }
}

fn protocol(argument: &str, word: &str, rest: &str) -> Result<Protocol, ArgumentError> {
    let words = || Protocol::ALL.iter().map(|&(word, _)| word);
    if let Some(&(_, protocol)) = Protocol::ALL.iter().find(|&&(known, _)| known == word) {
        return Ok(protocol);
    }
    let (argument, word) = (argument.to_owned(), word.to_owned());
    if word == "https" {
        let name = rest.trim_end_matches('/').to_owned();
        return Err(ArgumentError::Https { argument, name });
    }
    let advice = match nearest(&word, words()) {
        Some(near) => format!("did you mean `{near}://`?"),
        None => format!("write {}", listed(words())),
    };
    Err(ArgumentError::Protocol { argument, word, advice })
}

/// An argument that is not `[PROTOCOL://]ALIAS[=TARGET[:PORT]]`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ArgumentError {
    /// No such protocol.
    #[error("in `{argument}`, `{word}` is not a protocol: {advice}")]
    Protocol {
        /// As it was typed.
        argument: String,
        /// The text before `://`.
        word: String,
        /// What to write instead.
        advice: String,
    },
    /// TLS is not part of the protocol.
    #[error(
        "in `{argument}`, `https` is not a protocol: write `{name}`; applications may speak TLS or not, and the \
         target is sent TLS either way"
    )]
    Https {
        /// As it was typed.
        argument: String,
        /// The alias.
        name: String,
    },
    /// A protocol without a port of its own.
    #[error(
        "`{argument}` has no port: write `{protocol}://{name}:8883`, or `{protocol}://{name}=TARGET:8883`"
    )]
    NoPort {
        /// As it was typed.
        argument: String,
        /// Its protocol.
        protocol: &'static str,
        /// The alias.
        name: String,
    },
    /// The port is none.
    #[error("in `{argument}`, `{port}` is not a port from 1 to 65535")]
    Port {
        /// As it was typed.
        argument: String,
        /// The text after the colon.
        port: String,
    },
    /// The file, or an argument before, has the alias with another value.
    #[error(
        "`{argument}` contradicts the file or an earlier argument, where `{name}` has `{key}: {value}`"
    )]
    Differs {
        /// As it was typed.
        argument: String,
        /// The alias.
        name: String,
        /// The key, as in a file.
        key: &'static str,
        /// Its value there.
        value: String,
    },
    /// Nothing before the `=`.
    #[error(
        "`{argument}` has no alias: write ALIAS or ALIAS=TARGET[:PORT], \
         such as `webscaler-manual=httpbin.org:8443`"
    )]
    NoName {
        /// As it was typed.
        argument: String,
    },
    /// Nothing after the `=`.
    #[error("`{argument}` has no target: write `{name}=httpbin.org`, or `{name}` to use DNS")]
    NoTarget {
        /// As it was typed.
        argument: String,
        /// The alias.
        name: String,
    },
    /// A port belongs to a target.
    #[error(
        "`{argument}` has a port but no target: write `{name}=TARGET:{port}`, \
         or set the alias' `port` in a file (--config)"
    )]
    PortWithoutTarget {
        /// As it was typed.
        argument: String,
        /// The alias.
        name: String,
        /// The text after the colon.
        port: String,
    },
    /// The alias is not a valid name.
    #[error("in `{argument}`, the alias: {source}")]
    Name {
        /// As it was typed.
        argument: String,
        /// What is wrong with it.
        source: BadName,
    },
    /// The target is not valid.
    #[error("in `{argument}`, the target: {source}")]
    Target {
        /// As it was typed.
        argument: String,
        /// What is wrong with it.
        source: BadTarget,
    },
}
