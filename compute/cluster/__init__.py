"""The server decides: records, transactions, scheduling, who may do what."""
