"""The laboratory: federations of many agents on one machine, by the code that is deployed."""
