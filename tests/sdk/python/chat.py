"""The official Python SDK on two nodes: subscribes on one, publishes on the other, and tells what it received.

usage: chat.py KEY CHANNEL SUBSCRIBE_HOST:PORT PUBLISH_HOST:PORT EXPECTED_COUNT json|msgpack

Says `ready` on a line of its own when it is attached, publishes when a line comes on standard input, and when
EXPECTED_COUNT messages have come prints them as one line of JSON and closes both connections.
"""

import asyncio
import base64
import json
import sys

from ably import AblyRealtime

WAIT_S = 30


def told(message):
    """A message as JSON can carry it; bytes as {"base64": …}."""
    data = message.data
    if isinstance(data, (bytes, bytearray)):
        data = {"base64": base64.b64encode(bytes(data)).decode()}
    return {"name": message.name, "data": data, "id": message.id}


async def main(key, channel_name, subscribe_at, publish_at, expected, wire_format):
    binary = wire_format == "msgpack"
    # The SDK ignores its port option for realtime, so the port rides on the host.
    subscriber = AblyRealtime(key=key, endpoint=subscribe_at, tls=False, use_binary_protocol=binary)
    publisher = AblyRealtime(key=key, endpoint=publish_at, tls=False, use_binary_protocol=binary)
    received = []
    complete = asyncio.Event()

    def on_message(message):
        received.append(told(message))
        if len(received) >= expected:
            complete.set()

    channel = subscriber.channels.get(channel_name)
    await asyncio.wait_for(channel.subscribe(on_message), WAIT_S)
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)

    outbound = publisher.channels.get(channel_name)
    await asyncio.wait_for(outbound.publish("text", "hello from python"), WAIT_S)
    await asyncio.wait_for(outbound.publish("object", {"language": "python", "n": 1}), WAIT_S)
    await asyncio.wait_for(outbound.publish("bytes", bytearray([0, 1, 254, 255])), WAIT_S)

    await asyncio.wait_for(complete.wait(), WAIT_S)
    print(json.dumps(received), flush=True)
    await asyncio.wait_for(subscriber.close(), WAIT_S)
    await asyncio.wait_for(publisher.close(), WAIT_S)


key, channel_name, subscribe_at, publish_at, expected, wire_format = sys.argv[1:]
asyncio.run(main(key, channel_name, subscribe_at, publish_at, int(expected), wire_format))
