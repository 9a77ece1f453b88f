"""Everything that processes and nodes say to each other; each wire type has its one place here."""
