"""The official Python SDK on strings: does what it is told, line by line, and tells all that the SDK says.

usage: recorder.py KEY HOST:PORT CLIENT_ID json|msgpack

Standard input, one JSON object a line: {"ref": N, "do": "subscribe" | "publish" | "enter" | "update" | "leave" |
"members" | "close", "channel": …, …}. Standard output, one JSON object a line: {"event": …} for what happened, and
{"ref": N, "answer": …} or {"ref": N, "error": …} when a command is done.
"""

import asyncio
import json
import sys

from ably import AblyRealtime
from ably.types.message import Message

ACTIONS = {0: "absent", 1: "present", 2: "enter", 3: "leave", 4: "update"}


def tell(**line):
    print(json.dumps(line, default=str), flush=True)


def told(error):
    code = getattr(error, "code", None)
    return {"code": code, "message": str(error)} if error else None


def member(event):
    return {
        "action": ACTIONS.get(event.action, str(event.action)),
        "clientId": event.client_id,
        "connectionId": event.connection_id,
        "data": event.data,
        "id": event.id,
    }


class Recorder:
    def __init__(self, key, host, client_id, wire_format):
        # The SDK ignores its port option for realtime, so the port rides on the host.
        self.client = AblyRealtime(
            key=key,
            endpoint=host,
            tls=False,
            client_id=client_id,
            use_binary_protocol=wire_format == "msgpack",
            disconnected_retry_timeout=200,
            suspended_retry_timeout=500,
            channel_retry_timeout=500,
        )
        self.client.connection.on(self.on_connection)

    def on_connection(self, change):
        tell(
            event="connection",
            state=change.current.value,
            previous=change.previous.value,
            connectionId=self.client.connection.connection_manager.connection_id,
            reason=told(change.reason),
        )

    async def subscribe(self, channel, presence=False, **_):
        attachment = self.client.channels.get(channel)

        def on_state(change):
            current, previous = change.current.value, change.previous.value
            # An update is told by the SDK as a change from attached to attached.
            kind = "update" if current == previous == "attached" else current
            tell(event="channel", channel=channel, state=kind, resumed=change.resumed, reason=told(change.reason))

        def on_message(message):
            tell(
                event="message",
                channel=channel,
                text=message.data,
                serial=message.serial,
                id=message.id,
                connectionId=message.connection_id,
            )

        attachment.on(on_state)
        listening = [attachment.subscribe(on_message)]
        if presence:
            listening.append(
                attachment.presence.subscribe(
                    lambda event: tell(event="presence", channel=channel, **member(event))
                )
            )
        # Both listen before either has waited for the channel: what comes with ATTACHED is heard.
        await asyncio.gather(*listening)

    async def connected(self):
        """Waits for the connection: what this SDK queues without one it puts before what it has to send again, in the
        list in which it looks up acknowledgements, and then mixes up the answers."""
        while self.client.connection.state.value != "connected":
            await self.client.connection.once_async("connected")

    async def publish(self, channel, texts, **_):
        await self.connected()
        messages = [Message(name="m", data=text) for text in texts]
        result = await self.client.channels.get(channel).publish(messages)
        return result.serials if result else []

    async def members(self, channel, **_):
        members = await self.client.channels.get(channel).presence.get()
        return [member(one) for one in members]

    async def enter(self, channel, data=None, **_):
        await self.connected()
        await self.client.channels.get(channel).presence.enter(data)

    async def update(self, channel, data=None, **_):
        await self.connected()
        await self.client.channels.get(channel).presence.update(data)

    async def leave(self, channel, **_):
        await self.connected()
        await self.client.channels.get(channel).presence.leave()

    async def close(self, **_):
        await self.client.close()

    async def run(self, ref, do, **more):
        try:
            tell(ref=ref, answer=await getattr(self, do)(**more))
        except Exception as error:  # noqa: BLE001 - whatever the SDK raises is an outcome to record
            tell(ref=ref, error=told(error))


async def main(argv):
    recorder = Recorder(*argv)
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    running = set()
    while line := await lines.readline():
        task = loop.create_task(recorder.run(**json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)


asyncio.run(main(sys.argv[1:]))
