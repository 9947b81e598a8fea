"""Where rows come from: shards on disk, a buffer on the device, data with known features."""
