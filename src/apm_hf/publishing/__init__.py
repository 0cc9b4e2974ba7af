"""Model folders for others: cards, licences, the Hub, conversion, export; import from the modules inside."""
