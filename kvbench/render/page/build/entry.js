export { cell, dot, line, link, plot, ruleX, ruleY, text } from "@observablehq/plot";
