"""The stages of an assessment, a folder each: pure logic, and a thin Serve wrapper beside it."""
