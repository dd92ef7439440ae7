//! Generates the Rust types of `proto/`; `protoc` is not needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["entry", "control", "peer", "segment", "checkpoint"]
        .map(|name| format!("proto/firth/{name}.proto"));
    println!("cargo::rerun-if-changed=proto/firth");
    prost_build::Config::new()
        .bytes(["."])
        // They hold secrets; `wire` says what may be shown.
        .skip_debug([".firth.control.v1.Key", ".firth.control.v1.Bootstrap"])
        .compile_fds(protox::compile(files, ["proto"])?)?;
    Ok(())
}
