// Ask a running server with OpenAI's package for Node: `mlxarch serve MODEL`, then
//   npm install openai && node client_openai.mjs "Why is the sky blue?" http://127.0.0.1:8000
import OpenAI from "openai";

const text = process.argv[2] ?? "Why is the sky blue?";
const url = process.argv[3] ?? "http://127.0.0.1:8000";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none" });

const stream = await client.chat.completions.create({
  model: "default",
  messages: [{ role: "user", content: text }],
  max_tokens: 200,
  stream: true,
});
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
process.stdout.write("\n");
