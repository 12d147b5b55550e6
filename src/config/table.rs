//! The macros that define a section of the configuration in one place.
//!
//! The struct, its defaults, the reader, the printer and the JSON Schema are generated from it, so they cannot drift.

use serde_json::Value as Json;

use super::{reader::Reader, tree::Node};

/// A mapping of known keys.
pub(crate) trait Section: Sized + 'static {
    /// What the section is for.
    const ABOUT: &'static str;

    /// Every key at its default; required ones are empty.
    fn blank() -> Self;

    /// The keys in the order of the documentation.
    fn keys() -> Vec<Key<Self>>;
}

/// One key of a section.
pub(crate) struct Key<S> {
    /// The key as written in the file.
    pub(crate) name: &'static str,
    /// What it is for.
    pub(crate) about: &'static str,
    /// Whether it must be given.
    pub(crate) required: bool,
    /// Reads the value of a node into a section; an invalid value leaves the default.
    pub(crate) read: fn(&mut S, &Node, &mut Reader),
    /// The section's value as it would be in the file.
    pub(crate) print: fn(&S) -> Json,
    /// JSON Schema of the value.
    pub(crate) schema: fn() -> Json,
}

/// A value that is one of a few words.
pub(crate) trait Choice: Copy + PartialEq + 'static {
    /// Each word with its meaning.
    const ALL: &'static [(&'static str, Self)];
}

/// Declares a section. Each key is `name: Type as Form = default`; a key without a default is required.
macro_rules! section {
    (
        $(#[doc = $about:literal])+
        $(#[derive($($derive:ident),+)])?
        pub struct $name:ident {
            $(
                $(#[doc = $doc:literal])+
                $field:ident: $ty:ty as $form:ty $(= $default:expr)?,
            )+
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Clone, Debug, PartialEq $($(, $derive)+)?)]
        pub struct $name {
            $( $(#[doc = $doc])+ pub $field: $ty, )+
        }

        impl $crate::config::table::Section for $name {
            const ABOUT: &'static str = concat!($($about),+);

            fn blank() -> Self {
                Self { $( $field: section!(@default $($default)?), )+ }
            }

            fn keys() -> Vec<$crate::config::table::Key<Self>> {
                vec![$(
                    $crate::config::table::Key {
                        name: stringify!($field),
                        about: concat!($($doc),+),
                        required: section!(@required $($default)?),
                        read: |section, node, reader| {
                            if let Some(value) = <$form as Form>::read(node, reader) {
                                section.$field = value;
                            }
                        },
                        print: |section| <$form as Form>::print(&section.$field),
                        schema: <$form as Form>::schema,
                    },
                )+]
            }
        }
    };
    (@default $default:expr) => { $default };
    (@default) => { Default::default() };
    (@required $default:expr) => { false };
    (@required) => { true };
}

/// Declares an enum whose variants are words of the file.
macro_rules! choice {
    (
        $(#[doc = $about:literal])+
        pub enum $name:ident {
            $( $(#[doc = $doc:literal])+ $variant:ident = $word:literal, )+
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $( $(#[doc = $doc])+ $variant, )+
        }

        impl $name {
            /// The word for it in the file.
            pub fn word(self) -> &'static str {
                match self { $( Self::$variant => $word, )+ }
            }
        }

        impl $crate::config::table::Choice for $name {
            const ALL: &'static [(&'static str, Self)] = &[$( ($word, Self::$variant) ),+];
        }
    };
}

/// Gives sections that have no required key their `Default`.
macro_rules! default_sections {
    ($($name:ident),+ $(,)?) => {
        $(
            impl Default for $name {
                fn default() -> Self {
                    <Self as $crate::config::table::Section>::blank()
                }
            }
        )+
    };
}

pub(crate) use {choice, default_sections, section};
