"""Configuration: YAML files and dotted overrides → frozen, validated sections."""
