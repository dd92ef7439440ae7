//! A single-node Apache Kafka of its own, and plain clients to write and read it with.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{Headers as _, Message as _};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use rdkafka::{Offset, TopicPartitionList};

const START: Duration = Duration::from_secs(90);

/// A running Kafka. It dies with this value, or with the test process: its shell waits for the pipe to close.
pub(crate) struct Kafka {
    /// `None` while it is not running.
    shell: Option<Child>,
    dir: PathBuf,
    port: u16,
    controller_port: u16,
}

/// Key and value of a record.
pub(crate) type Pair<'a> = (Option<&'a [u8]>, Option<&'a [u8]>);

/// The one that all tests share that do not hurt it.
pub(crate) fn shared() -> &'static Kafka {
    static SHARED: OnceLock<Kafka> = OnceLock::new();
    SHARED.get_or_init(Kafka::start)
}

fn jars() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let jars = std::env::var_os("FIRTH_KAFKA_JARS")
        .map_or_else(|| root.join("target/kafka"), PathBuf::from);
    let holds_kafka = std::fs::read_dir(&jars).is_ok_and(|mut entries| {
        entries.any(|e| e.is_ok_and(|e| e.file_name().to_string_lossy().starts_with("kafka_2.13")))
    });
    assert!(
        holds_kafka,
        "no Kafka in {}: run `make setup` first, or point FIRTH_KAFKA_JARS at its jars",
        jars.display()
    );
    jars
}

/// A port that nothing listens on now.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

impl Kafka {
    pub(crate) fn start() -> Self {
        Self::start_at(free_port())
    }

    pub(crate) fn start_at(port: u16) -> Self {
        let dir = tempfile::tempdir().unwrap().keep();
        let controller_port = free_port();
        let mut kafka = Self {
            shell: None,
            dir,
            port,
            controller_port,
        };
        kafka.configure();
        kafka.run();
        kafka
    }

    /// Nothing expires: the tests' records are stamped soon after 1970.
    fn configure(&self) {
        let Self {
            dir,
            port,
            controller_port,
            ..
        } = self;
        let dir = dir.display();
        let properties = format!(
            "process.roles=broker,controller\nnode.id=1\n\
             controller.quorum.voters=1@127.0.0.1:{controller_port}\n\
             listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}\n\
             advertised.listeners=PLAINTEXT://127.0.0.1:{port}\n\
             controller.listener.names=CONTROLLER\nlog.dirs={dir}/data\nnum.partitions=3\n\
             default.replication.factor=1\noffsets.topic.replication.factor=1\n\
             offsets.topic.num.partitions=1\ntransaction.state.log.replication.factor=1\n\
             transaction.state.log.min.isr=1\ntransaction.state.log.num.partitions=4\n\
             auto.create.topics.enable=true\n\
             log.retention.ms=-1\n"
        );
        std::fs::write(self.dir.join("kafka.properties"), properties).unwrap();
        let format = self.java(&[
            "kafka.tools.StorageTool",
            "format",
            "-t",
            "MkU3OEVBNTcwNTJENDM2Qg",
            "-c",
        ]);
        let done = Command::new("sh").args(["-c", &format]).output().unwrap();
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
    }

    fn java(&self, args: &[&str]) -> String {
        let (jars, dir) = (jars(), self.dir.display());
        let (jars, args) = (jars.display(), args.join(" "));
        format!("java -Xmx512m -cp '{jars}/*' {args} {dir}/kafka.properties")
    }

    /// Starts it (again) on the same data, and waits until it answers.
    pub(crate) fn run(&mut self) {
        let (java, dir) = (self.java(&["kafka.Kafka"]), self.dir.display());
        let script = format!(
            "{java} >{dir}/out 2>&1 </dev/null & pid=$!; read line; kill -9 $pid; wait $pid; [ \"$line\" ] || rm -rf {dir}"
        );
        let shell = Command::new("sh")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        self.shell = Some(shell.unwrap());
        let deadline = Instant::now() + START;
        let client: BaseConsumer = self.config().create().unwrap();
        while client.fetch_metadata(None, Duration::from_secs(1)).is_err() {
            assert!(
                Instant::now() < deadline,
                "kafka does not answer: {}",
                std::fs::read_to_string(self.dir.join("out")).unwrap_or_default()
            );
        }
    }

    /// `kill -9`; the data stays.
    pub(crate) fn kill(&mut self) {
        use std::io::Write as _;
        let mut shell = self.shell.take().unwrap();
        let mut stdin = shell.stdin.take().unwrap();
        stdin.write_all(b"keep\n").unwrap();
        shell.wait().unwrap();
    }

    pub(crate) fn servers(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(crate) fn config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.servers());
        config
    }

    pub(crate) fn create_topic(&self, name: &str, partitions: i32) {
        let admin: AdminClient<DefaultClientContext> = self.config().create().unwrap();
        let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
        let created = wait(admin.create_topics([&topic], &AdminOptions::new()));
        created.unwrap().remove(0).unwrap();
    }

    pub(crate) fn delete_topic(&self, name: &str) {
        let admin: AdminClient<DefaultClientContext> = self.config().create().unwrap();
        let deleted = wait(admin.delete_topics(&[name], &AdminOptions::new()));
        deleted.unwrap().remove(0).unwrap();
    }

    /// As retention does: nothing below the offset is left.
    pub(crate) fn expire(&self, topic: &str, partition: i32, offset: i64) {
        let admin: AdminClient<DefaultClientContext> = self.config().create().unwrap();
        let mut list = TopicPartitionList::new();
        let offset = Offset::Offset(offset);
        list.add_partition_offset(topic, partition, offset).unwrap();
        wait(admin.delete_records(&list, &AdminOptions::new())).unwrap();
    }

    /// Writes (key, value) pairs in order.
    pub(crate) fn produce<'a>(&self, topic: &str, records: impl IntoIterator<Item = Pair<'a>>) {
        let producer: BaseProducer = (self.config())
            .set("enable.idempotence", "true")
            .create()
            .unwrap();
        send(&producer, topic, records);
        producer.flush(Duration::from_secs(30)).unwrap();
    }

    /// Every committed record of a topic up to its present end, by partition in order: key, value, headers.
    pub(crate) fn read_committed(&self, topic: &str) -> Vec<Read> {
        let consumer: BaseConsumer = (self.config())
            .set("group.id", "verifier")
            .set("enable.auto.commit", "false")
            .set("isolation.level", "read_committed")
            .set("enable.partition.eof", "true")
            .create()
            .unwrap();
        let timeout = Duration::from_secs(10);
        let metadata = consumer.fetch_metadata(Some(topic), timeout).unwrap();
        let partitions = metadata.topics()[0].partitions().len();
        let mut list = TopicPartitionList::new();
        for partition in 0..i32::try_from(partitions).unwrap() {
            list.add_partition_offset(topic, partition, Offset::Beginning)
                .unwrap();
        }
        consumer.assign(&list).unwrap();
        let (mut ended, mut read) = (0, Vec::new());
        let deadline = Instant::now() + Duration::from_secs(60);
        while ended < partitions {
            assert!(Instant::now() < deadline, "topic {topic} does not end");
            match consumer.poll(Duration::from_millis(100)) {
                None => {}
                Some(Err(_)) => ended += 1,
                Some(Ok(message)) => read.push(Read {
                    partition: message.partition(),
                    offset: message.offset(),
                    key: message
                        .key()
                        .map(|k| String::from_utf8(k.to_vec()).unwrap()),
                    value: message.payload().map(<[u8]>::to_vec),
                    headers: message.headers().map_or_else(BTreeMap::new, |headers| {
                        (headers.iter())
                            .map(|h| {
                                (
                                    h.key.to_owned(),
                                    String::from_utf8(h.value.unwrap().to_vec()).unwrap(),
                                )
                            })
                            .collect()
                    }),
                }),
            }
        }
        read
    }
}

/// On a thread of its own, as a test may be inside a runtime.
fn wait<T: Send>(future: impl Future<Output = T> + Send) -> T {
    std::thread::scope(|scope| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        scope
            .spawn(move || runtime.block_on(future))
            .join()
            .unwrap()
    })
}

pub(crate) fn send<'a>(
    producer: &BaseProducer,
    topic: &str,
    records: impl IntoIterator<Item = Pair<'a>>,
) {
    for (key, payload) in records {
        let mut record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(topic);
        (record.key, record.payload) = (key, payload);
        producer.send(record).map_err(|(err, _)| err).unwrap();
        producer.poll(Duration::ZERO);
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Read {
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) key: Option<String>,
    pub(crate) value: Option<Vec<u8>>,
    pub(crate) headers: BTreeMap<String, String>,
}

impl Read {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.value.clone().unwrap()).unwrap()
    }
}

impl Drop for Kafka {
    fn drop(&mut self) {
        if let Some(mut shell) = self.shell.take() {
            drop(shell.stdin.take());
            let _ = shell.wait();
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
