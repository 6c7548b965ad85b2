"""Files that appear whole or not at all, and strangers' files read so that nothing in them runs."""
