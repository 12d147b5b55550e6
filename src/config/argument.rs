//! An alias on the command line.

use thiserror::Error;

use super::{
    Alias,
    names::{BadName, BadTarget, normal_name},
};

impl Alias {
    /// Parses `ALIAS`, `ALIAS=TARGET` or `ALIAS=TARGET:PORT`; an IPv6 target is in brackets.
    pub fn from_arg(argument: &str) -> Result<Self, ArgumentError> {
        let (name, target) = match argument.split_once('=') {
            Some((name, target)) => (name, Some(target)),
            None => (argument, None),
        };
        if name.is_empty() {
            return Err(ArgumentError::NoName { argument: argument.to_owned() });
        }
        if target.is_none()
            && let Some((name, port)) = name.rsplit_once(':')
        {
            return Err(ArgumentError::PortWithoutTarget {
                argument: argument.to_owned(),
                name: name.to_owned(),
                port: port.to_owned(),
            });
        }
        let name = normal_name(name)
            .map_err(|source| ArgumentError::Name { argument: argument.to_owned(), source })?;
        let target = match target {
            Some("") => {
                return Err(ArgumentError::NoTarget { argument: argument.to_owned(), name });
            }
            Some(text) => Some(text.parse().map_err(|source| ArgumentError::Target {
                argument: argument.to_owned(),
                source,
            })?),
            None => None,
        };
        Ok(Self { target, ..Self::named(name) })
    }
}

/// An argument that is not `ALIAS[=TARGET[:PORT]]`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ArgumentError {
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
