"""Lines, tables, pages and pictures, made from records and files alone; nothing here needs torch."""
