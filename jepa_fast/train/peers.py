"""Ends a run in moments when one of its ranks dies, and says which; a collective alone might wait for it for minutes.

Every rank keeps a connection to the first one, over which nothing is sent until the end. The kernel closes it with the
process, however that ends, and keep-alive packets find a machine that is gone. The first rank names the dead one.
"""

import os
import selectors
import socket
import sys
import threading

import torch
import torch.distributed as dist

DONE, FAILED = b"d", b"f"  # left in good order; failed and said why
CONNECT_TIMEOUT_S = 60.0


class Peers:
    def __init__(self, rank: int, size: int, host: str, group: "dist.ProcessGroup"):
        self.rank, self.host = rank, host
        self.advice = ""  # how to go on, put after the message
        port = torch.zeros(1, dtype=torch.int64)
        if rank == 0:
            listener = socket.create_server(("", 0), backlog=size, family=_family(host), dualstack_ipv6=False)
            port[0] = listener.getsockname()[1]
        dist.broadcast(port, 0, group=group)
        if rank == 0:
            with listener:
                listener.settimeout(CONNECT_TIMEOUT_S)
                accepted = [listener.accept()[0] for _ in range(size - 1)]
            self._sockets = {int.from_bytes(_exactly(peer, 4)): peer for peer in accepted}
        else:
            peer = socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S)
            peer.sendall(rank.to_bytes(4))
            self._sockets = {0: peer}
        for peer in self._sockets.values():
            peer.settimeout(None)
            _keep_alive(peer)
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def leave(self, failed: bool = False) -> None:
        """Tell the others that this rank ends as it should, or that it failed and has said why."""
        sockets, self._sockets = self._sockets, {}
        for peer in sockets.values():
            try:
                peer.sendall(FAILED if failed else DONE)
            except OSError:  # gone before us
                pass

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for rank, peer in self._sockets.items():
            selector.register(peer, selectors.EVENT_READ, rank)
        while selector.get_map():
            for key, _ in selector.select():
                try:
                    said = key.fileobj.recv(1)
                except OSError:
                    said = b""
                selector.unregister(key.fileobj)
                if said != DONE and self._sockets:
                    self._end(key.data, said)

    def _end(self, rank: int, said: bytes) -> None:
        # where the first rank is gone the second one says so
        if said == b"" and (self.rank == 0 or self.rank == 1):
            print(f"\njepa-fast: error: rank {rank} died without a word (killed, out of memory?); the run ends{self.advice}",
                  file=sys.stderr, flush=True)
        if self.rank == 0:
            self.leave(failed=True)
        os._exit(1)


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None)[0][0]


def _exactly(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += peer.recv(count - len(data)) or b"\0" * count
    return data[:count]


def _keep_alive(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
