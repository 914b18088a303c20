"""The machine under a run: devices, memory, processes, signals, writes that hold."""
