"""``AsyncFileWriter`` as ColossalAI uses it: writes in a thread, and takes its time."""

import ctypes
import threading
import time

SECONDS = 0.3


class AsyncFileWriter:
    """What was handed over is in the file when ``synchronize`` has returned, and not before."""

    unfinished = 0
    """Writers of this process that have not been waited for."""

    def __init__(self, path, n_entries=16, backend=None, n_tasks=None):
        self.offset = 0
        self._path = path
        self._pieces = []
        self._thread = threading.Thread(target=self._write_slowly, daemon=True)
        self._started = False
        AsyncFileWriter.unfinished += 1

    def write(self, data):
        self._add(bytes(data))

    def write_raw(self, holder, address, size, offset):
        assert offset == self.offset
        self._add(ctypes.string_at(address, size))

    def write_tensor(self, tensor, pinned=None):
        held = tensor.detach().cpu().contiguous()
        self._add(ctypes.string_at(held.data_ptr(), held.numel() * held.element_size()))

    def register_h2d(self, count):
        pass

    def register_tasks(self, count):
        pass

    def sync_before_step(self):
        self._start()

    def synchronize(self):
        self._start()
        self._thread.join()
        AsyncFileWriter.unfinished -= 1

    def _add(self, data):
        self._pieces.append(data)
        self.offset += len(data)

    def _start(self):
        if not self._started:
            self._started = True
            self._thread.start()

    def _write_slowly(self):
        with open(self._path, "wb") as file:
            for piece in self._pieces:
                file.write(piece)
                file.flush()
            time.sleep(SECONDS)
