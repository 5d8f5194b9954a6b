"""Everything that uses Ray; nothing outside of this folder imports it."""
