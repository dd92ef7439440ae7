//! Generates the Rust types of `proto/`; `protoc` is not needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["entry", "control", "peer", "segment", "checkpoint"]
        .map(|name| format!("proto/firth/{name}.proto"));
    println!("cargo::rerun-if-changed=proto/firth");
    prost_build::Config::new()
        .bytes(["."])
        .compile_fds(protox::compile(files, ["proto"])?)?;
    Ok(())
}
