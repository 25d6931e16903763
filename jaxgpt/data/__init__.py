"""Turn text into token ids, ids into windows, and windows into batches on the device."""
