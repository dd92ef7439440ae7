// The official Go SDK on strings: does what it is told, line by line, and tells all that the SDK says.
//
// usage: recorder KEY HOST:PORT CLIENT_ID json|msgpack
//
// Standard input and output are those of python/recorder.py, but for "close", which is the end of the input.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/ably/ably-go/ably"
)

// What a test waits for is bounded by the test.
const patience = 10 * time.Minute

type line map[string]any

var out = struct {
	sync.Mutex
	*json.Encoder
}{Encoder: json.NewEncoder(os.Stdout)}

func tell(what line) {
	out.Lock()
	defer out.Unlock()
	if err := out.Encode(what); err != nil {
		os.Exit(0)
	}
}

func told(err error) any {
	var info *ably.ErrorInfo
	switch {
	case errors.As(err, &info) && info != nil:
		return line{"code": info.Code, "message": info.Error()}
	case err != nil && !errors.As(err, &info):
		return line{"message": err.Error()}
	}
	return nil
}

func reason(info *ably.ErrorInfo) any {
	if info == nil {
		return nil
	}
	return told(info)
}

func member(event *ably.PresenceMessage) line {
	return line{
		"action":       strings.ToLower(event.Action.String()),
		"clientId":     event.ClientID,
		"connectionId": event.ConnectionID,
		"data":         event.Data,
		"id":           event.ID,
	}
}

type command struct {
	Ref      int      `json:"ref"`
	Do       string   `json:"do"`
	Channel  string   `json:"channel"`
	Presence bool     `json:"presence"`
	Texts    []string `json:"texts"`
	Data     any      `json:"data"`
}

type recorder struct{ client *ably.Realtime }

func newRecorder(key, address, clientID, format string) (*recorder, error) {
	host, text, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	port, err := strconv.Atoi(text)
	if err != nil {
		return nil, err
	}
	client, err := ably.NewRealtime(
		ably.WithKey(key),
		ably.WithEndpoint(host),
		ably.WithPort(port),
		ably.WithTLS(false),
		ably.WithInsecureAllowBasicAuthWithoutTLS(),
		ably.WithClientID(clientID),
		ably.WithUseBinaryProtocol(format == "msgpack"),
		ably.WithAutoConnect(false),
		ably.WithDisconnectedRetryTimeout(200*time.Millisecond),
		ably.WithSuspendedRetryTimeout(500*time.Millisecond),
		ably.WithChannelRetryTimeout(500*time.Millisecond),
	)
	if err != nil {
		return nil, err
	}
	self := &recorder{client}
	client.Connection.OnAll(func(change ably.ConnectionStateChange) {
		tell(line{
			"event":        "connection",
			"state":        strings.ToLower(change.Current.String()),
			"previous":     strings.ToLower(change.Previous.String()),
			"connectionId": client.Connection.ID(),
			"reason":       reason(change.Reason),
		})
	})
	client.Connect()
	return self, nil
}

func (self *recorder) subscribe(ctx context.Context, name string, presence bool) error {
	channel := self.client.Channels.Get(name)
	channel.OnAll(func(change ably.ChannelStateChange) {
		state := strings.ToLower(change.Current.String())
		if change.Event == ably.ChannelEventUpdate {
			state = "update"
		}
		tell(line{
			"event":   "channel",
			"channel": name,
			"state":   state,
			"resumed": change.Resumed,
			"reason":  reason(change.Reason),
		})
	})
	// Both listen before either has waited for the channel: what comes with ATTACHED is heard.
	listening := make(chan error, 1)
	go func() {
		if !presence {
			listening <- nil
			return
		}
		_, err := channel.Presence.SubscribeAll(ctx, func(event *ably.PresenceMessage) {
			told := member(event)
			told["event"], told["channel"] = "presence", name
			tell(told)
		})
		listening <- err
	}()
	_, err := channel.SubscribeAll(ctx, func(message *ably.Message) {
		tell(line{
			"event":        "message",
			"channel":      name,
			"text":         message.Data,
			"id":           message.ID,
			"connectionId": message.ConnectionID,
		})
	})
	return errors.Join(err, <-listening)
}

func (self *recorder) do(it command) (any, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	channel := self.client.Channels.Get(it.Channel)
	switch it.Do {
	case "subscribe":
		return nil, self.subscribe(ctx, it.Channel, it.Presence)
	case "publish":
		messages := make([]*ably.Message, len(it.Texts))
		for n, text := range it.Texts {
			messages[n] = &ably.Message{Name: "m", Data: text}
		}
		return nil, channel.PublishMultiple(ctx, messages)
	case "members":
		found, err := channel.Presence.Get(ctx)
		members := make([]line, len(found))
		for n, one := range found {
			members[n] = member(one)
		}
		return members, err
	case "enter":
		return nil, channel.Presence.Enter(ctx, it.Data)
	case "update":
		return nil, channel.Presence.Update(ctx, it.Data)
	case "leave":
		return nil, channel.Presence.Leave(ctx, nil)
	}
	return nil, errors.New("unknown command " + it.Do)
}

func main() {
	self, err := newRecorder(os.Args[1], os.Args[2], os.Args[3], os.Args[4])
	if err != nil {
		panic(err)
	}
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var it command
		if err := json.Unmarshal(lines.Bytes(), &it); err != nil {
			panic(err)
		}
		go func() {
			answer, err := self.do(it)
			if err != nil {
				tell(line{"ref": it.Ref, "error": told(err)})
				return
			}
			tell(line{"ref": it.Ref, "answer": answer})
		}()
	}
}
