//! The two macros by which a section of the configuration is written down once.

/// Declares a section: the struct, its documentation, and for each key the default.
///
/// A key without `=` is required.
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
            fn blank() -> Self {
                Self { $( $field: section!(@default $($default)?), )+ }
            }
        }
    };
    (@default $default:expr) => { $default };
    (@default) => { Default::default() };
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

/// A mapping of known keys.
pub(crate) trait Section: Sized {
    /// Every key at its default, the required ones empty.
    fn blank() -> Self;
}
