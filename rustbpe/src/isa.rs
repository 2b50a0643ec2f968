//! One body, compiled for several instruction sets: the compiler makes vector code of plain loops, and the processor's best is taken at run time.

use std::sync::OnceLock;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Isa {
    Plain,
    Avx2,
    Avx512,
    Avx512Bf16,
}

/// The best that this processor has.
pub fn isa() -> Isa {
    static FOUND: OnceLock<Isa> = OnceLock::new();
    *FOUND.get_or_init(found)
}

#[cfg(target_arch = "x86_64")]
fn found() -> Isa {
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
        Isa::Plain
    } else if !(is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl")) {
        Isa::Avx2
    } else if !is_x86_feature_detected!("avx512bf16") {
        Isa::Avx512
    } else {
        Isa::Avx512Bf16
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn found() -> Isa {
    Isa::Plain
}

/// Whether plain loops become fused multiply-adds: without them `f32::mul_add` is a call of a slow library function.
pub fn is_fast() -> bool {
    isa() != Isa::Plain || cfg!(target_arch = "aarch64")
}

/// `per_isa!(fn name[generics](arguments) body)`: `name` runs `body` compiled for the instruction set it is given.
macro_rules! per_isa {
    ($(#[$meta:meta])* pub fn $name:ident [$($generics:tt)*] [$($passed:tt)*] ($isa:ident: Isa, $($argument:ident: $kind:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        pub fn $name<$($generics)*>($isa: Isa, $($argument: $kind),*) {
            #[inline(always)]
            fn body<$($generics)*>($isa: Isa, $($argument: $kind),*) $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2<$($generics)*>($isa: Isa, $($argument: $kind),*) {
                body::<$($passed)*>($isa, $($argument),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
            fn avx512<$($generics)*>($isa: Isa, $($argument: $kind),*) {
                body::<$($passed)*>($isa, $($argument),*)
            }

            match $isa {
                // SAFETY: `isa()` gives what the processor has.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => unsafe { avx2::<$($passed)*>($isa, $($argument),*) },
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 | Isa::Avx512Bf16 => unsafe { avx512::<$($passed)*>($isa, $($argument),*) },
                _ => body::<$($passed)*>($isa, $($argument),*),
            }
        }
    };
}
pub(crate) use per_isa;
